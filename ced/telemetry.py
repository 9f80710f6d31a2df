"""Usage data that libraries would send. A module that imports one of them sets these variables before the import."""

# Each is read once, when its library is imported.
SWITCHES = {
    # ONNX Runtime keeps a device id and a database with names of models in the user's cache, and uploads it.
    "ORT_DISABLE_TELEMETRY": "1",
    # The hub's client, and through it Transformers, send the versions of installed packages with each request.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Ray sends the size of the cluster and which of its libraries are used.
    "RAY_USAGE_STATS_ENABLED": "0",
}
