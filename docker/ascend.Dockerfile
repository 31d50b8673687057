# The library and the pipeline on an Ascend NPU, whose driver is the host's: docs/ascend.md. From the root of a checkout:
#   docker build -f docker/ascend.Dockerfile --build-arg CANN_IMAGE=IMAGE_WITH_CANN_9.1_AND_PYTHON_3.11 \
#     --build-arg TORCH_INDEX=URL_OF_A_CPU_INDEX -t camera:ascend .
ARG CANN_IMAGE
FROM ${CANN_IMAGE}

# A pair of the vendor's table for the CANN of the image (camera/ascend/pairing.py).
ARG TORCH=2.10.0
ARG TORCH_INDEX=
ARG SET_ENV=/usr/local/Ascend/ascend-toolkit/set_env.sh
ENV SET_ENV=${SET_ENV} PATH=/opt/venv/bin:${PATH}
USER 0
WORKDIR /opt/camera
COPY constraints.txt ./
# torch first, and a CPU build of it: torch_npu brings the device. Our own pin of torch is for development.
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && sed -i '/^torch==/d' constraints.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==${TORCH}" \
    && pip install --no-cache-dir -c constraints.txt "torch-npu==${TORCH}"
COPY pyproject.toml README.md LICENSE prefect.yaml ./
COPY camera camera
COPY tasks tasks
COPY flows flows
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt -e '.[npu,pipeline,llama,tasks]' "torch==${TORCH}" \
    && useradd --uid 10001 --create-home camera

USER 10001
WORKDIR /home/camera
ENTRYPOINT ["/bin/bash", "-c", "source \"$SET_ENV\" && exec camera \"$@\"", "camera"]
CMD ["--help"]
