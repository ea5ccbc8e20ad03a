import sys
from benchmarks.engine_step import *
from benchmarks.client import percentile

dev = sys.argv[1]
sec = float(sys.argv[2])
sh = Shapes(
    57 if dev == "cuda" else 4,
    8,
    8192 if dev == "cuda" else 1024,
    16384 if dev == "cuda" else 256,
    131072 if dev == "cuda" else 1024,
)
st = measure(dev, sh, sec)
for n, v in (("engine", st.engine), ("kernels", st.kernels), ("prefill", st.prefill)):
    print(n, [round(percentile(v, p), 1) for p in (10, 50, 90, 99)], len(v))
