# Training and serving on NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t tnllm:cuda .
#   docker run --gpus all --ipc host -v "$PWD:/home/tnllm/work" -w /home/tnllm/work tnllm:cuda train 385m --nproc 8
# torch's wheels bring CUDA along and the host brings the driver, so no CUDA image is needed.
# Not built by this project's tests, which run without Docker; hadolint reads it.
FROM python:3.12-slim
# Triton compiles a small C launcher for each kernel.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv==0.13.9
WORKDIR /src
COPY . .
RUN uv pip install --system --no-cache --constraint constraints.txt '.[serve,data,hf]' \
    && useradd --create-home --uid 1000 tnllm
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /home/tnllm
EXPOSE 8000
ENTRYPOINT ["tnllm"]
CMD ["--help"]
