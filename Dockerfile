# syntax=docker/dockerfile:1
# A server of one model, without torch. Build: docker build -t ced . Run: docs/serve.md.

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/ced
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ced ced
RUN /opt/ced/bin/pip install -c constraints.txt '.[serve,media]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home ced \
    && install -d -o ced -g ced /var/cache/ced
COPY --from=build /opt/ced /opt/ced
# One thread a window: the server runs as many windows at a time as there are cores.
ENV PATH=/opt/ced/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 CED_CACHE=/var/cache/ced \
    ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1
USER ced
VOLUME /var/cache/ced
EXPOSE 8000
# The first start downloads the model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz/live', timeout=4)"]
ENTRYPOINT ["ced", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["-m", "ced_mini"]
