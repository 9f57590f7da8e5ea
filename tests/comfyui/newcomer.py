"""Does what a newcomer does in ComfyUI's front end: Templates, this pack, the demo, Run; prints what came of it.

python newcomer.py URL SCREENSHOT PACK TEMPLATE
"""

import json
import shutil
import sys

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

READY = "() => window.app?.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 100"
SECOND, MINUTE = 1_000, 60_000


def main(url, screenshot, pack, template):
    progress, errors = {}, []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 2900, "height": 1500})
        page.on("websocket", lambda socket: socket.on("framereceived", lambda data: note(data, progress, errors)))
        page.goto(url)
        page.wait_for_function(READY, timeout=2 * MINUTE)
        # A first visit opens the templates by itself, after a while.
        page.wait_for_timeout(5 * SECOND)
        if not page.get_by_text(pack, exact=True).count():
            page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.get_by_text(pack, exact=True).first.click()
        page.get_by_test_id(f"template-workflow-{template}").first.click()
        page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'SaveVideo')", timeout=MINUTE)
        page.wait_for_timeout(2 * SECOND)
        red = page.evaluate("() => app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type)")
        # The button itself, or in older versions what holds it and its menu.
        queue = page.get_by_test_id("queue-button")
        (queue if queue.evaluate("(found) => found.tagName") == "BUTTON" else queue.get_by_role("button").first).click()
        try:
            page.wait_for_function("() => document.querySelector('video')?.readyState >= 2", timeout=6 * MINUTE)
        except PlaywrightError:
            page.screenshot(path=screenshot)
            sys.stderr.write(f"{errors} {progress} {page.evaluate('document.body.innerText')[:2000]}")
            raise
        page.evaluate("() => { app.canvas.ds.reset(); app.extensionManager.command.execute('Comfy.Canvas.FitView'); }")
        page.wait_for_timeout(3 * SECOND)
        page.screenshot(path=screenshot)
        sources = page.evaluate("() => [...document.querySelectorAll('video')].map((video) => video.src)")
        browser.close()
    sys.stdout.write(json.dumps({"videos": sources, "progress": progress, "errors": errors, "red": red}))


def note(data, progress, errors):
    """Keep what the server says of progress, by node, and of errors."""
    if not isinstance(data, str):
        return
    message = json.loads(data)
    if message["type"] == "progress":
        progress.setdefault(message["data"]["node"], []).append([message["data"]["value"], message["data"]["max"]])
    elif message["type"] == "execution_error":
        errors.append(message["data"])


if __name__ == "__main__":
    main(*sys.argv[1:])
