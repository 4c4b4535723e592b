"""A BERT sentence encoder as an ONNX graph: token ids in, sentence embeddings out, pooling and length included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bert import BertShape, Weights
from .libraries import need_to_build

OPSET = 17  # the first with LayerNormalization
_MOVED = 0.7  # share of the difference between channels that goes into the weights, as an exponent
_IR_VERSION = 8  # what goes with that opset, so that older runtimes read the file


def bert_graph(weights: Weights, shape: BertShape) -> Any:
    """An onnx.ModelProto: input_ids, attention_mask (n, n_tokens) int64 → sentence_embedding (n, n_embd) float32.

    The mean over the tokens that attention_mask has as 1, scaled to unit length. Every token is of type 0.
    It loses little when its matrices are made int8: see `_balance`.
    """
    return _Graph(weights, shape).build()


def _balance(gain: NDArray[np.float32], offset: NDArray[np.float32], weight: NDArray[np.float32]) -> Any:
    """What to divide the channels (n_in,) of a norm's output by, and multiply the rows of the weight (n_in, n_out) by.

    A few channels are far larger than the others, and int8 has one step for all of them. How large each becomes is
    known from the norm's gain and offset; part of that is moved into the weight, which has a step for each column.
    """
    tiny = np.float32(1e-6)
    reach = np.maximum(3 * np.abs(gain) + np.abs(offset), tiny)  # three standard deviations
    scale = reach**_MOVED / np.maximum(np.abs(weight).max(1), tiny) ** (1 - _MOVED)
    return (scale / np.exp(np.log(scale).mean())).astype(np.float32)


class _Graph:
    """Nodes and constants, in the order in which things happen."""

    def __init__(self, weights: Weights, shape: BertShape) -> None:
        self._onnx = need_to_build("onnx")
        self._weights, self._shape = weights, shape
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}

    def build(self) -> Any:
        onnx, helper = self._onnx, self._onnx.helper
        states = self._embed()
        bias = self._mask_bias()
        for layer in range(self._shape.n_layer):
            states = self._layer(states, bias, f"encoder.layer.{layer}")
        self._pool(states)
        sizes = ["n", "n_tokens"]
        inputs = [
            helper.make_tensor_value_info(name, onnx.TensorProto.INT64, sizes)
            for name in ("input_ids", "attention_mask")
        ]
        output = helper.make_tensor_value_info("sentence_embedding", onnx.TensorProto.FLOAT, ["n", self._shape.n_embd])
        graph = helper.make_graph(
            self._nodes, "sentence_encoder", inputs, [output], initializer=list(self._constants.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="edge-runtime")
        model.ir_version = _IR_VERSION
        onnx.checker.check_model(model)
        return model

    # --- the stages ---

    def _embed(self) -> str:
        """Words and positions; the one token type there is, is added to the positions beforehand."""
        words = self._node("Gather", [self._weight("embeddings.word_embeddings.weight"), "input_ids"], "words")
        types = self._weights["embeddings.token_type_embeddings.weight"][0]
        table = self._constant("positions", self._weights["embeddings.position_embeddings.weight"] + types)
        n_tokens = self._node("Shape", ["input_ids"], "n_tokens", start=1, end=2)
        positions = self._node("Slice", [table, self._integers("zero", [0]), n_tokens], "used_positions")
        return self._norm(self._node("Add", [words, positions], "embedded"), "embeddings.LayerNorm")

    def _mask_bias(self) -> str:
        """(n, 1, 1, n_tokens): 0 for a token, a large negative number for padding; also the mask as float32."""
        self._node("Cast", ["attention_mask"], "mask", to=self._onnx.TensorProto.FLOAT)
        absent = self._node("Sub", ["mask", self._constant("one", np.float32(1))], "absent")
        bias = self._node("Mul", [absent, self._constant("far_below", np.float32(1e4))], "flat_bias")
        return self._node("Unsqueeze", [bias, self._integers("head_axes", [1, 2])], "mask_bias")

    def _layer(self, states: str, bias: str, at: str) -> str:
        attended = self._dense(self._attend(states, bias, at), f"{at}.attention.output.dense")
        states = self._norm(
            self._node("Add", [states, attended], f"{at}.with_attention"), f"{at}.attention.output.LayerNorm"
        )
        wide = self._gelu(self._widen(states, at), f"{at}.gelu")
        narrow = self._dense(wide, f"{at}.output.dense")
        return self._norm(self._node("Add", [states, narrow], f"{at}.with_ff"), f"{at}.output.LayerNorm")

    def _attend(self, states: str, bias: str, at: str) -> str:
        """One product for query, key and value, whose scale is in the query's weights."""
        head = self._shape.n_embd // self._shape.n_head
        one = np.float32(1)
        of = [
            (f"{at}.attention.self.{part}", scale)
            for part, scale in (("query", one / np.float32(math.sqrt(head))), ("key", one), ("value", one))
        ]
        weight = np.concatenate([self._weights[f"{part}.weight"] * scale for part, scale in of]).T
        offset = np.concatenate([self._weights[f"{part}.bias"] * scale for part, scale in of])
        joined = self._affine(states, f"{at}.qkv", weight, offset)
        split = self._integers("heads_shape", [0, 0, 3, self._shape.n_head, head])
        heads = self._node("Reshape", [joined, split], f"{at}.heads")
        # (3, n, n_head, n_tokens, head)
        ordered = self._node("Transpose", [heads], f"{at}.ordered", perm=[2, 0, 3, 1, 4])
        query, key, value = (
            self._node("Gather", [ordered, self._constant(f"part_{i}", np.int64(i))], f"{at}.part_{i}", axis=0)
            for i in range(3)
        )
        turned = self._node("Transpose", [key], f"{at}.turned", perm=[0, 1, 3, 2])
        scores = self._node("MatMul", [query, turned], f"{at}.scores")
        shares = self._node("Softmax", [self._node("Add", [scores, bias], f"{at}.masked")], f"{at}.shares", axis=-1)
        mixed = self._node("MatMul", [shares, value], f"{at}.mixed")
        back = self._node("Transpose", [mixed], f"{at}.back", perm=[0, 2, 1, 3])
        flat = self._integers("flat_shape", [0, 0, self._shape.n_embd])
        return self._node("Reshape", [back, flat], f"{at}.attended")

    def _widen(self, states: str, at: str) -> str:
        """The first half of the feed-forward part, its input balanced; without that, int8 loses most here."""
        name, norm = f"{at}.intermediate.dense", f"{at}.attention.output.LayerNorm"
        weight = self._weights[f"{name}.weight"].T
        scale = _balance(self._weights[f"{norm}.weight"], self._weights[f"{norm}.bias"], weight)
        balanced = self._node("Mul", [states, self._constant(f"{name}.balance", 1 / scale)], f"{name}.balanced")
        return self._affine(balanced, name, weight * scale[:, None], self._weights[f"{name}.bias"])

    def _pool(self, states: str) -> None:
        """The mean over tokens that count, scaled to unit length."""
        column = self._node("Unsqueeze", ["mask", self._integers("last_axis", [-1])], "mask_column")
        counted = self._node("Mul", [states, column], "counted")
        # a mean's direction is the sum's: the number of tokens goes when the length does
        total = self._node("ReduceSum", [counted, self._integers("token_axis", [1])], "total", keepdims=0)
        length = self._node("ReduceL2", [total], "length", axes=[1], keepdims=1)
        safe = self._node("Max", [length, self._constant("least_length", np.float32(1e-12))], "safe_length")
        self._node("Div", [total, safe], "sentence_embedding")

    # --- building blocks ---

    def _dense(self, x: str, name: str) -> str:
        return self._affine(x, name, self._weights[f"{name}.weight"].T, self._weights[f"{name}.bias"])

    def _affine(self, x: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        """x @ weight + bias, with weight (n_in, n_out)."""
        product = self._node("MatMul", [x, self._constant(f"{name}.matrix", weight)], f"{name}.product")
        return self._node("Add", [product, self._constant(f"{name}.offset", bias)], name)

    def _gelu(self, x: str, name: str) -> str:
        """x · (1 + erf(x / √2)) / 2, in the order in which runtimes recognise it."""
        scaled = self._node("Div", [x, self._constant("root_of_two", np.float32(math.sqrt(2)))], f"{name}.scaled")
        erf = self._node("Erf", [scaled], f"{name}.erf")
        plus = self._node("Add", [erf, self._constant("one", np.float32(1))], f"{name}.plus")
        product = self._node("Mul", [x, plus], f"{name}.product")
        return self._node("Mul", [product, self._constant("half", np.float32(0.5))], name)

    def _norm(self, x: str, name: str) -> str:
        inputs = [x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self._node("LayerNormalization", inputs, name, axis=-1, epsilon=self._shape.norm_eps)

    def _weight(self, name: str) -> str:
        return self._constant(name, self._weights[name])

    def _integers(self, name: str, values: list[int]) -> str:
        return self._constant(name, np.array(values, np.int64))

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
            self._constants[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output
