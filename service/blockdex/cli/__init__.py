"""The commands of `blockdex`."""

import os

# Read when gRPC is imported. Its own lines, one for every connection that does not come to be, are in no format of
# ours, and a server has as many of them as strangers like.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
