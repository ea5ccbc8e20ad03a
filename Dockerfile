# Images of blockdex. Three targets:
#
#   server  (default) for NVIDIA GPUs; torch's CUDA build brings the CUDA libraries, the host only its driver
#   cpu     without CUDA; TORCH_INDEX says where torch's CPU build comes from
#   engine  `cpu` and the transformers example, which calls a server
#
#   docker build --tag blockdex:server .
#   docker build --tag blockdex:cpu --target cpu --build-arg TORCH_INDEX=URL --build-arg TORCH_SHA256=HEX .
#
# Packages come with hashes from deploy/requirements (`make lock`). BASE may carry a digest, and be any image with
# Python 3.11 or later, its venv, pip and headers, and apt. Another package index than pip's own is named by a pip.conf that
# is there while building only: --secret id=pip.conf,src=pip.conf
ARG BASE=python:3.12-slim-bookworm

# blockdex's own wheel.
FROM ${BASE} AS wheel
WORKDIR /src
RUN python3 -m venv /opt/build
COPY deploy/requirements/build.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/build/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r build.txt
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY service service
RUN /opt/build/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --no-index --wheel-dir /wheels .

# The server's packages with torch's CUDA build: gigabytes.
FROM ${BASE} AS packages-server
WORKDIR /packages
RUN python3 -m venv /opt/blockdex
COPY deploy/requirements/server.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/blockdex/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r server.txt
COPY --from=wheel /wheels /wheels
RUN /opt/blockdex/bin/python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

# The same with torch's CPU build.
FROM ${BASE} AS packages-cpu
WORKDIR /packages
ARG TORCH_VERSION=2.13.0+cpu
# Address of the index with torch's CPU build; without one, where pip.conf says.
ARG TORCH_INDEX=
# The hash of its wheel there. Builds of another source have another one, so it is not in the lock; without it,
# torch is pinned by version alone.
ARG TORCH_SHA256=
RUN python3 -m venv /opt/blockdex
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    echo "torch==${TORCH_VERSION}${TORCH_SHA256:+ --hash=sha256:${TORCH_SHA256}}" > torch.txt \
    && /opt/blockdex/bin/python -m pip install --no-cache-dir --no-deps --only-binary :all: \
       ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} -r torch.txt
COPY deploy/requirements/cpu.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/blockdex/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r cpu.txt
COPY --from=wheel /wheels /wheels
RUN /opt/blockdex/bin/python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

# What every image runs in: a user of its own, and nothing that needs to be written outside /tmp.
FROM ${BASE} AS runtime
# Folders that volumes are mounted on take their owner from here: the socket's, and that of load tests' reports.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin blockdex \
    && install --directory --owner blockdex --group blockdex --mode 0750 /run/blockdex /reports
ENV PATH=/opt/blockdex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BLOCKDEX_GRPC_ADDRESS=0.0.0.0:50051 \
    BLOCKDEX_HTTP_ADDRESS=0.0.0.0:9051
WORKDIR /run/blockdex
USER 10001:10001
EXPOSE 50051 9051
# A GPU server compiles kernels and fills its cache before it serves.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["blockdex", "health", "--timeout", "4"]
ENTRYPOINT ["blockdex"]
CMD ["serve"]

# What Triton needs to compile its launchers at run time: a C compiler, libc's headers and Python's, and a folder that it may
# write and load from: mount a tmpfs there, with exec.
FROM runtime AS triton
USER 0:0
# Debian keeps only the newest of a package: a pinned version would stop building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner blockdex --group blockdex --mode 0700 /var/cache/triton \
    && python3 -c "import sysconfig, pathlib; pathlib.Path(sysconfig.get_path('include'), 'Python.h').stat()"
ENV CC=gcc \
    TRITON_CACHE_DIR=/var/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM runtime AS cpu
COPY --from=packages-cpu /opt/blockdex /opt/blockdex
ENV BLOCKDEX_DEVICE=cpu

FROM cpu AS engine
WORKDIR /app
COPY deploy/requirements/engine.txt ./
USER 0:0
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r engine.txt
USER 10001:10001
COPY LICENSE ./
COPY examples examples
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "examples.transformers_engine"]
CMD ["--address", "127.0.0.1:50051"]

FROM triton AS server
COPY --from=packages-server /opt/blockdex /opt/blockdex
