# The application and nothing else: no compiler, no Java started, no root. See docs/deployment.md.
FROM python:3.13-slim AS packages
COPY requirements.txt .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.txt

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin app && install --directory --owner=app /data
COPY --from=packages /venv /venv
WORKDIR /app
COPY streams_app streams_app
COPY tables tables
COPY agents agents
ENV PATH=/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PORT=6066 \
    STREAMS_APP_DATADIR=/data \
    STREAMS_APP_EMBEDDED_KAFKA=no
USER app
VOLUME /data
EXPOSE 6066
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/livez', timeout=4)"]
ENTRYPOINT ["faust", "-A", "streams_app"]
CMD ["worker"]
