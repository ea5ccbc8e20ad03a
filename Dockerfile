# Images of blockdex. Three targets:
#
#   server  (default) for NVIDIA GPUs; torch's CUDA build brings the CUDA libraries, the host only its driver
#   cpu     for machines without a GPU; with TORCH_INDEX, which says where torch's CPU build comes from, without CUDA's libraries
#   engine  `cpu` and the transformers example, which calls a server
#
#   docker build --tag blockdex:server .
#   docker build --tag blockdex:cpu --target cpu .
#   docker build --tag blockdex:cpu --target cpu --build-arg TORCH_INDEX=URL --build-arg TORCH_SHA256=HEX .
#
# Packages come with hashes from deploy/requirements (`make lock`). BASE may carry a digest, and be any image with
# Python 3.11 or later, its venv, pip and headers, and apt. Another package index than pip's own is named by a pip.conf that
# is there while building only: --secret id=pip.conf,src=pip.conf
ARG BASE=python:3.12-slim-bookworm

# blockdex's own wheel, with its compiled module: Python's headers come with the base, the compiler does not.
FROM ${BASE} AS wheel
WORKDIR /src
# Debian keeps only the newest of a package: a pinned version would stop building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build
COPY deploy/requirements/build.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/build/bin/python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r build.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY kernels kernels
COPY service service
RUN /opt/build/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --no-index --wheel-dir /wheels .

# What every image runs in: a user of its own, and nothing that needs to be written outside /tmp. Packages are layers of the images
# themselves, the largest first, so that another version of blockdex is a small new layer.
FROM ${BASE} AS runtime
WORKDIR /run/blockdex
# Folders that volumes are mounted on take their owner from here: the socket's, and that of load tests' reports.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin blockdex \
    && install --directory --owner blockdex --group blockdex --mode 0750 /run/blockdex /reports \
    && python3 -m venv /opt/blockdex
ENV PATH=/opt/blockdex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BLOCKDEX_GRPC_ADDRESS=0.0.0.0:50051 \
    BLOCKDEX_HTTP_ADDRESS=0.0.0.0:9051
EXPOSE 50051 9051
# A GPU server compiles kernels and fills its cache before it serves.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["blockdex", "health", "--timeout", "4"]
ENTRYPOINT ["blockdex"]
CMD ["serve"]

FROM runtime AS cpu
ARG TORCH_VERSION=2.13.0+cpu
# Address of the index with torch's CPU build, which is not where the other packages are.
ARG TORCH_INDEX=
# The hash of its wheel there. Builds of another source have another one, so it is not in the lock; without it,
# torch is pinned by version alone. A hash without an address: pip.conf leads there.
ARG TORCH_SHA256=
COPY deploy/requirements/cpu.txt deploy/requirements/server.txt /opt/blockdex/
# Without either, torch comes with CUDA's libraries as in the target `server`: it serves on a CPU too.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    packages=/opt/blockdex/server.txt \
    && if [ -n "${TORCH_INDEX}${TORCH_SHA256}" ]; then \
         packages=/opt/blockdex/cpu.txt \
         && echo "torch==${TORCH_VERSION}${TORCH_SHA256:+ --hash=sha256:${TORCH_SHA256}}" > /opt/blockdex/torch.txt \
         && python -m pip install --no-cache-dir --no-deps --only-binary :all: \
            ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} -r /opt/blockdex/torch.txt; \
       fi \
    && python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r "${packages}"
COPY --from=wheel /wheels /opt/blockdex/wheels
RUN python -m pip install --no-cache-dir --no-index --no-deps /opt/blockdex/wheels/*.whl
ENV BLOCKDEX_DEVICE=cpu
USER 10001:10001

FROM cpu AS engine
WORKDIR /app
USER 0:0
COPY deploy/requirements/engine.txt /opt/blockdex/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r /opt/blockdex/engine.txt
COPY LICENSE ./
COPY examples examples
USER 10001:10001
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "examples.transformers_engine"]
CMD ["--address", "127.0.0.1:50051"]

# What Triton needs to compile its launchers at run time: a C compiler, libc's headers and Python's, and a folder that it may
# write and load from: mount a tmpfs there, with exec.
FROM runtime AS triton
# Debian keeps only the newest of a package: a pinned version would stop building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner blockdex --group blockdex --mode 0700 /var/cache/triton \
    && python -c "import sysconfig, pathlib; pathlib.Path(sysconfig.get_path('include'), 'Python.h').stat()"
ENV CC=gcc \
    TRITON_CACHE_DIR=/var/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# torch's CUDA build: gigabytes.
FROM triton AS server
USER 0:0
COPY deploy/requirements/server.txt /opt/blockdex/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: -r /opt/blockdex/server.txt
COPY --from=wheel /wheels /opt/blockdex/wheels
RUN python -m pip install --no-cache-dir --no-index --no-deps /opt/blockdex/wheels/*.whl
USER 10001:10001
