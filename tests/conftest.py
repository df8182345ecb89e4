"""Where several processes run the tests (`pytest -n`), each takes its share of the processors."""

import os

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if _WORKERS > 1:  # before anything imports PyTorch; programs that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // _WORKERS, 1)))
