# syntax=docker/dockerfile:1
# Two images.
#
#   docker build --tag nemo-spin .                    for GPUs: NVIDIA's container + NeMo + nemo_spin
#   docker build --target cpu --tag nemo-spin:cpu .   to try it: the quickstart, no GPU
#
# Arguments: BASE_IMAGE (another NGC NeMo or PyTorch container with Python 3.11 or newer), MAY_CHANGE
# (packages of it that pip may replace, where its pins leave NeMo no choice), PIP_EXTRA_INDEX_URL
# (where the CPU image finds CPU builds of torch), USER_ID, VERSION, REVISION.

# Python 3.12, megatron-core 0.18, Transformer Engine 2.16, Apex and vLLM 0.20 are in it; NeMo is not.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:26.06
ARG CPU_BASE_IMAGE=python:3.11-slim-bookworm

# ---------------------------------------------------------------------------------------- cpu
FROM ${CPU_BASE_IMAGE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# libnuma1: vLLM's CPU kernels are linked to it. No version: the base's distribution keeps one, and moves on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# Another user of the base may have that number: it is the number that counts.
ARG USER_ID=10001
RUN useradd --no-log-init --create-home --non-unique --uid "${USER_ID}" spin \
    && install --directory --owner=spin --group=spin /opt/nemo_spin /opt/nemo_spin/runs
WORKDIR /opt/nemo_spin
COPY --chown=spin:spin pyproject.toml README.md LICENSE ./
COPY --chown=spin:spin conf ./conf
COPY --chown=spin:spin examples ./examples
COPY --chown=spin:spin nemo_spin ./nemo_spin

# The pinned lists of conf/environments/: an environment to train and one to sample.
USER ${USER_ID}
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
RUN bash examples/install.sh

ARG CPU_BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_spin (CPU)" \
      org.opencontainers.image.description="Self-play fine-tuning (SPIN) with Megatron and vLLM: the quickstart, on CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${CPU_BASE_IMAGE}"

HEALTHCHECK --interval=5m --timeout=60s --start-period=60s CMD [".venv/bin/nemo-spin", "doctor", "--quick"]
# Results lie in /opt/nemo_spin/runs: mount a volume there to keep them and to go on.
ENTRYPOINT ["bash", "examples/quickstart.sh"]

# ---------------------------------------------------------------------------------------- gpu
FROM ${BASE_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /opt/nemo_spin
COPY pyproject.toml README.md LICENSE ./
COPY conf ./conf
COPY examples ./examples
COPY nemo_spin ./nemo_spin

# Pins every package of the image, adds what is missing, and fails if any version or place has changed.
ARG MAY_CHANGE=""
ENV PIP_NO_CACHE_DIR=1
RUN chmod -R a+rX . \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python examples/install_in_container.py \
        --constraints /opt/nemo_spin/constraints.txt --may-change ${MAY_CHANGE}

# Another user of the base may have that number: it is the number that counts.
ARG USER_ID=10001
RUN useradd --no-log-init --create-home --non-unique --uid "${USER_ID}" spin \
    && install --directory --owner=spin --group=spin /workspace/runs
WORKDIR /workspace/runs
USER ${USER_ID}
# What root installed must be readable for everyone else: a container of a cluster runs as its user.
RUN nemo-spin --help >/dev/null

ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_spin" \
      org.opencontainers.image.description="Self-play fine-tuning (SPIN) of language models at Megatron scale" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

HEALTHCHECK --interval=5m --timeout=60s --start-period=60s CMD ["nemo-spin", "doctor", "--quick"]
# The entry point stays NVIDIA's: it says which driver it found and starts what it is given.
CMD ["nemo-spin", "--help"]
