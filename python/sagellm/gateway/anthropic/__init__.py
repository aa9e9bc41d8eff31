"""Routes in the form of Anthropic's API."""
