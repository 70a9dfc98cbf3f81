"""Metadata services on the loopback that behave as those of the clouds do, and as broken ones do."""

from __future__ import annotations

import email.utils
import http.server
import json
import socket
import threading
import time
from urllib.parse import parse_qs, urlsplit


class Service:
    """A metadata service; `cloud` is ec2, gce or azure. Its clock is `clock_off` seconds ahead of this machine's."""

    def __init__(self, cloud, clock_off=0.0):
        self.cloud, self.clock_off = cloud, clock_off
        self.fault = None
        self.values = {}
        self.tokens, self.requests, self.posted = set(), [], []
        self.changed = threading.Condition()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                service._answer(self)

            do_GET = do_PUT = do_POST = handle_any

            def log_message(self, *args):
                pass

            def date_time_string(self, timestamp=None):
                return email.utils.formatdate(time.time() + service.clock_off, usegmt=True)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def where(self):
        return self._server.server_address

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def set(self, name, value):
        with self.changed:
            self.values[name] = value
            self.changed.notify_all()

    def time(self, seconds):
        """A moment, by the clock of the cloud."""
        return time.time() + self.clock_off + seconds

    def notice(self, seconds=120.0):
        """The cloud announces the end."""
        if self.cloud == "ec2":
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.time(seconds)))
            self.set("action", json.dumps({"action": "terminate", "time": moment}))
        elif self.cloud == "gce":
            self.set("preempted", "TRUE")
        else:
            moment = email.utils.formatdate(self.time(seconds), usegmt=True)
            event = {"EventId": "A1", "EventType": "Preempt", "Resources": ["_vm_3"], "NotBefore": moment}
            other = {**event, "EventId": "B2", "Resources": ["vm_4"], "NotBefore": ""}
            freeze = {**event, "EventId": "C3", "EventType": "Freeze", "Resources": ["vm_3"], "NotBefore": ""}
            self.set("events", [other, freeze, {**event, "Resources": ["VM_3"]}])

    def withdraw(self):
        self.values.clear()

    def _answer(self, handler):
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length).decode()
        self.requests.append((handler.command, handler.path))
        fault = self.fault
        if fault == "reset":
            linger = b"\1\0\0\0\0\0\0\0"
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.close_connection = True
        elif fault == "garbage":
            handler.wfile.write(b"\0\1\2 SSH-2.0-nothing\r\n\r\n")
            handler.close_connection = True
        elif fault == "drip":
            try:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(1000):
                    handler.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        elif fault == "large":
            try:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(64):
                    handler.wfile.write(b"x" * 65536)
            except OSError:
                pass
            handler.close_connection = True
        elif fault == "redirect":
            self._send(handler, 302, "", Location="http://127.0.0.1:1/")
        elif fault == "cut":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nTR")
            handler.close_connection = True
        elif isinstance(fault, int):
            self._send(handler, fault, "no")
        else:
            getattr(self, "_" + self.cloud)(handler, body)

    def _send(self, handler, status, body, **headers):
        handler.send_response(status)
        data = body.encode()
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _ec2(self, handler, body):
        if handler.path == "/latest/api/token":
            if handler.command != "PUT" or not handler.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                return self._send(handler, 400, "")
            token = f"token{len(self.requests)}=="
            self.tokens.add(token)
            return self._send(handler, 200, token)
        if handler.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return self._send(handler, 401, "")
        names = {"spot/instance-action": "action", "events/recommendations/rebalance": "rebalance"}
        found = self.values.get(names.get(handler.path.partition("/latest/meta-data/")[2]))
        return self._send(handler, 404 if found is None else 200, found or "<html>404</html>")

    def _gce(self, handler, body):
        if handler.headers.get("Metadata-Flavor") != "Google":
            return self._send(handler, 403, "")
        parts = urlsplit(handler.path)
        name, query = parts.path.rpartition("/")[2], parse_qs(parts.query)
        default = {"preempted": "FALSE", "maintenance-event": "NONE"}[name]
        with self.changed:
            if "wait_for_change" in query and query["last_etag"] == [f"e-{self.values.get(name, default)}"]:
                old = self.values.get(name, default)
                self.changed.wait_for(
                    lambda: self.values.get(name, default) != old, int(query["timeout_sec"][0])
                )
            value = self.values.get(name, default)
        return self._send(handler, 200, value, Metadata_Flavor="Google", ETag=f"e-{value}")

    def _azure(self, handler, body):
        if handler.headers.get("Metadata") != "true":
            return self._send(handler, 400, "")
        if handler.path.startswith("/metadata/instance/compute/name"):
            return self._send(handler, 200, "vm_3")
        if handler.command == "POST":
            self.posted.append(json.loads(body))
            return self._send(handler, 200, "")
        return self._send(
            handler, 200, json.dumps({"DocumentIncarnation": 1, "Events": self.values.get("events", [])})
        )
