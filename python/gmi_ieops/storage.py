"""NFS storage, which this version does not have."""

raise ImportError(
    "gmi_ieops.storage is not available in this version of sagellm: mount the share and open its "
    "files by their local paths"
)
