"""The serving SDK under its original name; see ``sagellm.serving``."""
