# The command line and the server on a CPU: docker build -f docker/cpu.Dockerfile -t tnllm:cpu .
# Not built by this project's tests, which run without Docker; hadolint reads it.
FROM python:3.12-slim
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /src
COPY . .
RUN uv pip install --system --no-cache --torch-backend cpu --constraint constraints.txt '.[serve,data,hf]' \
    && useradd --create-home --uid 1000 tnllm
USER 1000
WORKDIR /home/tnllm
EXPOSE 8000
ENTRYPOINT ["tnllm"]
CMD ["--help"]
