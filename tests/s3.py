"""A real S3 server over HTTP, and a slow, unreliable proxy in front of it."""

import http.client
import http.server
import random
import threading
import time

import boto3
from moto.server import ThreadedMotoServer


class Bucket:
    """A server with one bucket."""

    def __init__(self, name="books"):
        self._server = ThreadedMotoServer(port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.name, self.address = name, ("127.0.0.1" if host == "0.0.0.0" else host, port)
        self.uri = f"s3://{name}"
        self.client().create_bucket(Bucket=name)

    def client(self):
        return boto3.session.Session().client(
            "s3",
            region_name="us-east-1",
            endpoint_url="http://{}:{}".format(*self.address),
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )

    def environment(self, endpoint=None):
        """The environment variables with which clients find this server."""
        return {
            "AWS_ENDPOINT_URL": endpoint or "http://{}:{}".format(*self.address),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def set_environment(self, monkeypatch):
        """Point this process to this server."""
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)

    def put(self, key, content):
        self.client().put_object(Bucket=self.name, Key=key, Body=content)

    def get(self, key):
        return self.client().get_object(Bucket=self.name, Key=key)["Body"].read()

    def names(self):
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def remove(self):
        """Delete the bucket: servers in one process share their buckets, and the next one must start empty."""
        for key in self.names():
            self.client().delete_object(Bucket=self.name, Key=key)
        self.client().delete_bucket(Bucket=self.name)

    def stop(self):
        self.remove()
        self._server.stop()


class UnreliableProxy:
    """A proxy that delays all requests, rejects some, and truncates some responses."""

    def __init__(self, address, failure_rate, max_delay_s, seed=0):
        draw, failures = random.Random(seed), []
        self.failures, self._lock = failures, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(handler):
                body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                time.sleep(max_delay_s * draw.random())
                kind = draw.random() / failure_rate  # below 0.5: rejected; below 1: truncated
                if kind < 0.5:
                    failures.append("503")
                    handler.send_error(503, "Slow Down")
                    return
                connection = http.client.HTTPConnection(*address, timeout=60)
                connection.request(handler.command, handler.path, body, dict(handler.headers))
                response = connection.getresponse()
                content = response.read()
                handler.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        handler.send_header(name, value)
                if "Content-Length" not in response.headers:
                    handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                if kind < 1:
                    failures.append("cut")
                    handler.wfile.write(content[: len(content) // 2])
                    handler.close_connection = True
                    handler.connection.close()
                elif handler.command != "HEAD":
                    handler.wfile.write(content)
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

            def log_message(handler, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
