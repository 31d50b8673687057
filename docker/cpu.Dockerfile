# The library and the pipeline on a CPU. From the root of a checkout:
#   docker build -f docker/cpu.Dockerfile --build-arg TORCH_INDEX=URL_OF_A_CPU_INDEX -t camera:cpu .
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}

# Without it x86-64 gets torch's CUDA build, of several GB.
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
