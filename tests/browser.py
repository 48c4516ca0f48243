"""Controls headless Chromium through its debugging pipe: pages, console errors and screenshots."""

import base64
import json
import os
import shutil
import subprocess
import time

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """A page of a browser that closes with the `with` block; `errors` collects console errors."""

    def __init__(self, profile, size=(1400, 900)):
        self.profile, self.size = profile, size
        self.errors: list[str] = []
        self.count, self.session, self.buffer, self.replies = 0, None, b"", {}

    def __enter__(self):
        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()
        flags = (
            f"{EXECUTABLE} --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage "
            f"--user-data-dir={self.profile} --window-size={self.size[0]},{self.size[1]} "
            f"--enable-unsafe-swiftshader --remote-debugging-pipe 3<&{theirs_in} 4>&{theirs_out}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {flags}"],  # sh supports only one-digit descriptors
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        os.close(self.ours_in)
        os.close(self.ours_out)

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while self.count not in self.replies:
            self._receive()
        reply = self.replies.pop(self.count)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def _receive(self):
        while b"\0" not in self.buffer:
            chunk = os.read(self.ours_in, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser ended")
            self.buffer += chunk
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "id" in message:
            self.replies[message["id"]] = message
            return
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
            case "Runtime.consoleAPICalled" if parameters["type"] == "error":
                self.errors.append(json.dumps(parameters["args"])[:500])
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.errors.append(json.dumps(parameters["entry"])[:500])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def wait(self, expression, seconds=60):
        """Waits until the expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} did not come true"
            time.sleep(0.2)

    def screenshot(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
