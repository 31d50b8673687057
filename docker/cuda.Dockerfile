# The library and the pipeline on an NVIDIA GPU, whose driver and container toolkit are the host's. From the root of a checkout:
#   docker build -f docker/cuda.Dockerfile -t camera:cuda .
#   docker run --gpus all camera:cuda doctor
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}

# Compiled layers are linked with a C compiler when a model is loaded; which one the base image's release decides.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Where torch's build for another version of CUDA than the default index's comes from.
ARG TORCH_INDEX=
WORKDIR /opt/camera
COPY constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY pyproject.toml README.md LICENSE prefect.yaml ./
COPY camera camera
COPY tasks tasks
COPY flows flows
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt -e '.[pipeline,llama,tasks]' \
    && useradd --uid 10001 --create-home camera

USER 10001
WORKDIR /home/camera
ENTRYPOINT ["camera"]
CMD ["--help"]
