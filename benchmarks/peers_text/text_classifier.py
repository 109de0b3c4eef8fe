"""What every peer serves as text in, label out: model, tokenizer and session options of a bundle, without our code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class TextClassifier:
    """A batch of texts to a label and a score each."""

    def __init__(self, folder: str, threads: int) -> None:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        text, session = manifest["preprocess"], manifest["session"]
        self.labels = manifest["labels"]
        self.inputs = [tensor["name"] for tensor in manifest["inputs"]]
        self.output = manifest["postprocess"]["output"]
        self.temperature = manifest["postprocess"]["temperature"]
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / text["tokenizer"]))
        self.tokenizer.enable_padding(pad_id=text["pad_id"])
        self.tokenizer.enable_truncation(text["max_length"])
        options = ort.SessionOptions()
        options.graph_optimization_level = LEVELS[session["graph_optimization_level"]]
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        for key, value in session["config_entries"].items():
            options.add_session_config_entry(key, value)
        for pool in ("intra_op", "inter_op"):
            options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
        self.session = ort.InferenceSession(
            str(Path(folder) / manifest["model"]),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=session["disabled_optimizers"] or None,
        )

    def __call__(self, texts: list[str]) -> list[tuple[str, float]]:
        encodings = self.tokenizer.encode_batch(texts)
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        feeds = {name: np.array(columns[name], dtype=np.int64) for name in self.inputs}
        logits = self.session.run([self.output], feeds)[0].astype(np.float64) / self.temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        table = powers / powers.sum(axis=1, keepdims=True)
        best = table.argmax(axis=1).tolist()
        return [(self.labels[at], float(row[at])) for at, row in zip(best, table, strict=True)]
