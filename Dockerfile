# syntax=docker/dockerfile:1

# Any Debian-based image with Python 3.11+ and its headers. The CUDA libraries come with the torch wheel and
# the driver with the NVIDIA container toolkit, so a CUDA base would only add a second copy.
ARG BASE=python:3.12-slim

FROM ${BASE} AS builder
# Empty: pip's own index, whose torch carries CUDA and runs on a CPU too. A CPU-only index makes a small image.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/layerskip
ENV PATH=/opt/layerskip/bin:$PATH
WORKDIR /src
# From what changes least to what changes most: torch, the other dependencies, the code.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.11,<2.14'
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE ./
COPY config config
COPY decoding decoding
COPY training training
COPY benchmarks benchmarks
COPY server server
RUN pip install --no-deps .

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="layerskip-server" \
      org.opencontainers.image.description="An OpenAI-compatible server for LayerSkip checkpoints" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Triton compiles a small C launcher for each kernel, when the kernel first runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# The launcher includes Python's C headers: without them kernels would be given up at every start, and silently.
RUN test -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
# The root file system may be read-only: home is /tmp, and all that should outlive the container is in /cache.
# Compiled kernels are loaded as shared objects, so they cannot stay in /tmp, which is often mounted noexec.
RUN groupadd --gid 10001 layerskip \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin layerskip \
    && install -d -o layerskip -g layerskip /cache /cache/huggingface /cache/triton
COPY --from=builder /opt/layerskip /opt/layerskip
ENV PATH=/opt/layerskip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LAYERSKIP_HOST=0.0.0.0 \
    LAYERSKIP_PORT=8000
VOLUME /cache
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# The start period covers downloading and loading a large checkpoint.
# A proxy meant for the hub must not be asked for this container's own server.
HEALTHCHECK --start-period=10m --interval=10s --timeout=3s --retries=3 \
    CMD ["python", "-I", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['LAYERSKIP_PORT'] + '/health', timeout=2)"]
ENTRYPOINT ["layerskip"]
CMD ["serve", "--host", "0.0.0.0"]
