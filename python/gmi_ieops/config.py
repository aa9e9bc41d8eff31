"""`sagellm.serving` under its original name: environment variables."""

from sagellm.serving import (
    ApiEnv,
    AppEnv,
    DeviceEnv,
    Env,
    EnvGroup,
    EnvVar,
    LogEnv,
    ModelEnv,
    RegisterEnv,
    ServerEnv,
    StorageEnv,
    env,
)

__all__ = [
    "ApiEnv",
    "AppEnv",
    "DeviceEnv",
    "Env",
    "EnvGroup",
    "EnvVar",
    "LogEnv",
    "ModelEnv",
    "RegisterEnv",
    "ServerEnv",
    "StorageEnv",
    "env",
]
