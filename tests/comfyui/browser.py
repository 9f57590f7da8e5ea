"""Opens saved graphs in ComfyUI's front end in headless Chromium; prints what it made of each as JSON.

python browser.py URL SCREENSHOTS GRAPH...
"""

import json
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

READY = "() => window.app?.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 100"
OPEN = """async (saved) => {
    await app.loadGraphData(saved, true, false);
    const made = app.graph.serialize();
    const types = Object.keys(LiteGraph.registered_node_types);
    const graphs = [app.graph, ...(app.graph.subgraphs?.values() ?? [])];
    // Newer versions mark nodes whose file is not on the server, which says nothing of the pack.
    const lost = ({value, options}) => Array.isArray(options?.values) && !options.values.includes(value);
    const file = (widget) => /\\.\\w+$/.test(widget.value) && lost(widget);
    const marked = (node) => node.has_errors && !node.widgets?.some(file);
    const red = graphs.flatMap((graph) => graph.nodes.filter(marked).map((node) => node.type));
    // Some versions make none of a graph of another one.
    const prompt = await app.graphToPrompt().catch(() => null);
    return {made, types, red, output: prompt?.output, version: window.__COMFYUI_FRONTEND_VERSION__};
}"""


def main(url, screenshots, *graphs):
    opened = {}
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(url)
        page.wait_for_function(READY, timeout=120_000)
        for graph in map(Path, graphs):
            opened[graph.name] = page.evaluate(OPEN, json.loads(graph.read_text(encoding="utf-8")))
            # The list of templates, then that of other packs' nodes that are missing.
            for _ in range(2):
                page.keyboard.press("Escape")
                page.wait_for_timeout(500)
            page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
            page.wait_for_timeout(1000)
            page.screenshot(path=Path(screenshots) / f"{graph.stem}.png")
        browser.close()
    sys.stdout.write(json.dumps(opened))


if __name__ == "__main__":
    main(*sys.argv[1:])
