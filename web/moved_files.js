// Graphs name model files as they lay where they were saved. The server finds those that lie elsewhere here, in
// another subfolder or with the separators of another system (saved_values.py); this shows them in the widgets, which
// today's front end would mark as missing.
import { app } from "../../scripts/app.js";

const MODEL = /\.(safetensors|sft|gguf|ckpt|pt|pth|bin|onnx)$/i;
const PACK = `custom_nodes.${decodeURIComponent(import.meta.url.split("/extensions/")[1].split("/")[0])}`;

const path = (name) => name.replaceAll("\\", "/");
const file = (name) => path(name).split("/").at(-1);

/** The listed file that a saved name stands for; undefined where there is none, or several of that name. */
function current(value, listed) {
    const named = listed.filter((name) => typeof name === "string" && file(name) === file(value));
    return named.find((name) => path(name) === path(value)) ?? (named.length === 1 ? named[0] : undefined);
}

app.registerExtension({
    name: "WanVideoWrapper.MovedFiles",
    loadedGraphNode(node) {
        if (node.constructor.nodeData?.python_module !== PACK) return;
        for (const widget of node.widgets ?? []) {
            const { value, options } = widget;
            if (typeof value !== "string" || !MODEL.test(value) || !Array.isArray(options?.values)) continue;
            if (!options.values.includes(value)) widget.value = current(value, options.values) ?? value;
        }
    },
});
