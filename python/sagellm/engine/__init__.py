"""The engine: continuous batching over a paged KV cache.

``llm.LLM`` is for scripts, ``async_engine.AsyncEngine`` for servers, ``engine.Engine`` for those
who drive the steps themselves.
"""
