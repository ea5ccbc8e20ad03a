"""A small engine with block tables of its own, on a pool; README.md beside this file says where to look."""

import os

# Model and server take turns on the same cores: the threads of the one that waits must not spin. Both get it from here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
