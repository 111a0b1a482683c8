# sageLLM with LMDeploy on NVIDIA GPUs. From the repository's root:
#   docker build -f k8s/images/cuda.Dockerfile -t sagellm:cuda .
# CUDA comes with PyTorch's wheel, the driver from the host through NVIDIA's container toolkit.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends g++ make patch && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/sagellm/src
ENV SAGELLM_CACHE=/opt/sagellm/cache
COPY Makefile pyproject.toml README.md requirements.lock ./
RUN mkdir sagellm_common services && make /opt/sagellm/venv/.installed VENV=/opt/sagellm/venv
COPY sagellm_common sagellm_common
COPY services services
COPY third_party third_party
# touch: the package is installed again, now that it is there.
RUN touch pyproject.toml && make setup VENV=/opt/sagellm/venv && /opt/sagellm/venv/bin/python -m compileall -q sagellm_common services
RUN /opt/sagellm/venv/bin/python -c 'import torch, triton; assert torch.version.cuda, "this torch has no CUDA"'

FROM ${BASE}
# Triton compiles a small launcher for each kernel when it first runs; libnuma and libibverbs are Mooncake's.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libcurl4 libibverbs1 libnuma1 && \
    rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 sagellm && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home sagellm
COPY --from=build /opt/sagellm /opt/sagellm
ENV PATH=/opt/sagellm/venv/bin:$PATH SAGELLM_CACHE=/opt/sagellm/cache HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
CMD ["sagellm", "--help"]
