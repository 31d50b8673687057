"""A headless Chromium over its DevTools protocol: open a page, wait for a text, click, take a picture."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Text of a page and of all that is inside it: shadow roots and frames of the same origin.
_TEXT = """
(() => {
  const read = node => {
    let text = node.body ? node.body.innerText : '';
    for (const element of node.querySelectorAll('*')) {
      if (element.shadowRoot) text += '\\n' + read(element.shadowRoot);
      if (element.tagName === 'IFRAME') {
        try { if (element.contentDocument) text += '\\n' + read(element.contentDocument); } catch (error) {}
        if (element.srcdoc) text += '\\n' + element.srcdoc;
      }
    }
    return text;
  };
  return document.title + '\\n' + read(document);
})()
"""
_PLACE = """
(wanted => {
  const all = [...document.querySelectorAll('a, button, [role=tab], [role=treeitem], [role=menuitem], li, span, div')];
  const shown = all.filter(e => e.innerText && e.innerText.trim() === wanted && e.getClientRects().length);
  const element = shown.find(e => ['A', 'BUTTON'].includes(e.tagName) || e.getAttribute('role')) || shown.at(-1);
  if (!element) return null;
  element.scrollIntoView({block: 'center'});
  const box = element.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})
"""


def find_browser() -> str | None:
    """Path of a Chromium, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one headless Chromium, which ends with the `with` block."""

    def __init__(self, program: str, width: int = 1440, height: int = 1000) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        arguments += ["--disable-features=IsolateSandboxedIframes", "--disable-site-isolation-trials"]
        arguments += ["--remote-debugging-port=0", f"--user-data-dir={self._profile}"]
        self._process = subprocess.Popen(
            [program, *arguments, f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._socket = connect(self._page_address(), max_size=None, open_timeout=60)
        except BaseException:
            self._end()
            raise
        self._last = 0
        self._send("Page.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._end()

    def open(self, address: str, *texts: str, seconds: float = 90) -> None:
        """Go to an address and wait until all texts are on the page."""
        self._send("Page.navigate", url=address)
        self.wait_for(*texts, seconds=seconds)

    def sign_in(self, user_and_password: str) -> None:
        """Show `user:password` with every request from now on, as after a browser's own question for them."""
        shown = base64.b64encode(user_and_password.encode()).decode()
        self._send("Network.enable")
        self._send("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {shown}"})

    def keep(self, name: str, value: str) -> None:
        """Put a text into the page's local storage."""
        self.evaluate(f"localStorage.setItem({json.dumps(name)}, {json.dumps(value)})")

    def evaluate(self, expression: str) -> Any:
        """What an expression of JavaScript is in the page; a promise is waited for."""
        found = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found.get("result", {}).get("value")

    def wait_for(self, *texts: str, seconds: float = 90) -> str:
        """Wait until all texts are on the page; the page's text.

        Raises:
            TimeoutError: with what is on the page instead.
        """
        until = time.monotonic() + seconds
        while True:
            page = str(self.evaluate(_TEXT) or "") + self._text_of_frames()
            missing = [text for text in texts if text not in page]
            if not missing:
                return page
            if time.monotonic() > until:
                raise TimeoutError(
                    f"the page has no {missing} after {seconds:.0f} s; it says:\n{page[:2000]}"
                )
            time.sleep(0.5)

    def click(self, text: str, seconds: float = 60) -> None:
        """Click the element whose whole text this is.

        Raises:
            TimeoutError: if there is none.
        """
        until = time.monotonic() + seconds
        while (place := self.evaluate(f"{_PLACE}({json.dumps(text)})")) is None:
            if time.monotonic() > until:
                page = str(self.evaluate(_TEXT))
                raise TimeoutError(f"nothing on the page to click says {text!r}; it says:\n{page[:2000]}")
            time.sleep(0.5)
        for kind in (
            "mouseMoved",
            "mousePressed",
            "mouseReleased",
        ):  # some tabs answer to the press, not to click()
            self._send(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def picture(self, path: Path, settle: float = 2.0) -> None:
        """Write what is seen as PNG, after what moves has come to rest."""
        time.sleep(settle)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _page_address(self) -> str:
        port_file = self._profile / "DevToolsActivePort"
        until = time.monotonic() + 90
        while time.monotonic() < until:
            if port_file.is_file() and (lines := port_file.read_text().splitlines()):
                with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=30) as answer:
                    pages = [page for page in json.load(answer) if page["type"] == "page"]
                if pages:
                    return str(pages[0]["webSocketDebuggerUrl"])
            if self._process.poll() is not None:
                raise RuntimeError(f"Chromium ended with code {self._process.returncode}")
            time.sleep(0.2)
        raise TimeoutError("Chromium does not open its DevTools port")

    def _text_of_frames(self) -> str:
        """Text inside frames, sandboxed ones too, which the page itself may not read."""
        text = ""
        for child in self._send("Page.getFrameTree")["frameTree"].get("childFrames", []):
            try:
                world = self._send("Page.createIsolatedWorld", frameId=child["frame"]["id"])
                found = self._send(
                    "Runtime.evaluate",
                    expression="document.body ? document.body.innerText : ''",
                    contextId=world["executionContextId"],
                    returnByValue=True,
                )
            except RuntimeError:
                continue  # it went away meanwhile
            text += "\n" + str(found.get("result", {}).get("value", ""))
        return text

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=120))
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)
