"""TensorFlow graphs with folded weights, for deployment."""

import contextlib
import functools
from typing import Literal

import keras
import numpy as np

from keras_resnest.checks import checked

# A scale and an offset can be folded into the kernel of these operations, which is input 1.
LINEAR = ("Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "MatMul")

# Operations that run in reduced precision, and which of their inputs are in that precision
# (others are shapes and axes). All others, notably softmax and norms, stay in float32.
REDUCED = {
    **dict.fromkeys(
        ("Conv2D", "DepthwiseConv2dNative", "MatMul", "BiasAdd", "AddV2", "Mul"), slice(2)
    ),
    **dict.fromkeys(("Relu", "Relu6", "MaxPool", "AvgPool", "Squeeze"), slice(1)),
    **dict.fromkeys(("Pad", "Reshape", "Transpose", "StridedSlice"), slice(1)),
    "Conv2DBackpropInput": slice(1, 3),
    "Split": slice(1, 2),
    "ConcatV2": slice(-1),
}

# In bytes. Larger constants are kept outside of the graph while it is rewritten: TensorFlow copies
# those inside many times.
LARGE_CONSTANT = 2**14


@checked
def deployment_function(
    network,
    specification,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    freeze: bool = True,
):
    """Returns a function of one tensor as one folded graph.

    Batch normalization is folded into the preceding convolution, training-only operations are
    removed, and the operations after a convolution get the order that TensorFlow fuses at run time
    (convolution, bias, addition, ReLU).

    Args:
        network: function of one tensor that returns a dictionary of tensors, such as
            `lambda images: {"predictions": model(images, training=False)}`.
        specification: `tf.TensorSpec` of the argument, with a name.
        precision: `"float32"`, `"bfloat16"` or `"float16"`, of the convolutions and the operations
            between them. Argument and results stay float32.
        freeze: whether weights are constants of the graph. TensorFlow copies those a dozen times
            while it loads and optimizes a graph. False makes them variables, which exist once for
            all functions that read them; oneDNN rearranges their values at every call, unless
            TF_ONEDNN_ASSUME_FROZEN_WEIGHTS=1 promises that they never change.

    Returns:
        A `tf.ConcreteFunction` with the same argument and results. Its attribute
        `network_variables` lists the variables.

    Raises:
        ValueError: if Keras does not run on TensorFlow, or `precision` is unknown.

    Example:
        >>> spec = tf.TensorSpec((None, 224, 224, 3), name="images")
        >>> fast = deployment_function(lambda x: {"predictions": model(x, training=False)}, spec)
        >>> fast(images)["predictions"]
    """
    check_backend()
    import tensorflow as tf

    graph_def, weights, outputs = _trace(network, specification)
    graph_def = _fold_constants(graph_def, outputs.values())
    graph = _Graph(graph_def, weights)
    graph.fold_scales_and_offsets()
    if precision != "float32":
        graph.reduce_precision(tf.as_dtype(precision))
    graph_def = _replace_nodes(graph_def, graph.nodes.values())
    graph_def = _fold_constants(graph_def, outputs.values())
    return _to_function(graph_def, weights, specification, outputs, freeze)


def check_backend() -> None:
    """Raises `ValueError` unless Keras runs on TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Models can only be exported on the TensorFlow backend: save the model, then load and "
            "export it with KERAS_BACKEND=tensorflow. "
            f"Received: backend={keras.backend.backend()!r}"
        )


# === Mixed precision ===


@contextlib.contextmanager
def float32_compute(model):
    """Lets the layers of a mixed-precision model compute in float32.

    Otherwise, casts would prevent folding into the convolutions.
    """
    policies = [(layer, layer.dtype_policy) for layer in model._flatten_layers()]
    mixed = [(layer, p) for layer, p in policies if p.compute_dtype != p.variable_dtype]
    statistics = [
        (layer, layer.mean, layer.variance)
        for layer, _ in mixed
        if isinstance(layer, keras.layers.Normalization)
    ]
    try:
        for layer, _ in mixed:
            layer.dtype_policy = "float32"
        for layer, *_ in statistics:
            _set_exact_statistics(layer)
        yield
    finally:
        for layer, policy in mixed:
            layer.dtype_policy = policy
        for layer, mean, variance in statistics:
            layer.mean, layer.variance = mean, variance


def _set_exact_statistics(layer: keras.layers.Normalization) -> None:
    """Undoes Keras' rounding of mean and variance to the compute precision of the layer."""
    if layer.input_mean is None:
        layer.finalize_state()
    else:
        shape = layer.mean.shape
        layer.mean = np.resize(np.asarray(layer.input_mean, "float32"), shape)
        layer.variance = np.resize(np.asarray(layer.input_variance, "float32"), shape)


# === Functions and graphs ===


def _trace(network, specification):
    """Returns a GraphDef, the large weights by the placeholders for them, and the outputs by key.

    An output is the name of its tensor.
    """
    import tensorflow as tf

    def in_float32(argument):
        return {name: tf.cast(x, tf.float32) for name, x in network(argument).items()}

    function = tf.function(in_float32, autograph=False).get_concrete_function(specification)
    variables = {variable.handle.ref(): variable for variable in function.graph.variables}
    captured = {
        inside.op.name: variables.get(value.ref(), value)
        for value, inside in function.graph.captures
    }
    nodes, weights = [], {}
    for node in function.graph.as_graph_def().node:
        if node.op == "ReadVariableOp":
            (source, *_), dtype = node.input, node.attr["dtype"]
            node = tf.compat.v1.NodeDef(op="Identity", name=node.name, input=[source])
            node.attr["T"].CopyFrom(dtype)
        value = captured.get(node.name)
        if node.op == "Const" and node.ByteSize() > LARGE_CONSTANT:
            value = tf.make_ndarray(node.attr["value"].tensor)
        nodes.append(node if value is None else _weight_node(node.name, value, weights))
    # TensorFlow flattens dictionaries in sorted order.
    keys = sorted(function.structured_outputs)
    outputs = {key: x.name for key, x in zip(keys, function.outputs, strict=True)}
    return _replace_nodes(function.graph.as_graph_def(), nodes), weights, outputs


def _weight_node(name: str, value, weights: dict):
    """Returns a constant, or the placeholder of a large one, which is added to `weights`."""
    import tensorflow as tf

    dtype, shape = tf.as_dtype(value.dtype), tf.TensorShape(value.shape)
    node = tf.compat.v1.NodeDef(op="Const", name=name)
    node.attr["dtype"].type = dtype.as_datatype_enum
    if shape.num_elements() * dtype.size > LARGE_CONSTANT:
        node.op, weights[name] = "Placeholder", value
        node.attr["shape"].shape.CopyFrom(shape.as_proto())
    else:
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.asarray(value)))
    return node


def _to_function(graph_def, weights: dict, specification, outputs: dict[str, str], freeze: bool):
    """Returns the concrete function of a graph, whose weights become constants or variables."""
    import tensorflow as tf

    # The new function's argument replaces the old placeholder.
    names = [node.name for node in graph_def.node]
    del graph_def.node[names.index(specification.name)]
    keep = np.asarray if freeze else functools.partial(tf.Variable, trainable=False)
    weights = {name: keep(weights[name]) for name in names if name in weights}

    def deployed(argument):
        values = {name: tf.convert_to_tensor(value) for name, value in weights.items()}
        values[specification.name] = argument
        tensors = tf.graph_util.import_graph_def(
            graph_def,
            input_map={f"{name}:0": value for name, value in values.items()},
            return_elements=list(outputs.values()),
            name="network",
        )
        return dict(zip(outputs, tensors, strict=True))

    function = tf.function(deployed, autograph=False).get_concrete_function(specification)
    function.network_variables = [] if freeze else list(weights.values())
    return function


def _fold_constants(graph_def, fetches):
    """Evaluates operations on constants, with TensorFlow's own optimizer."""
    import tensorflow as tf
    from tensorflow.python.grappler import tf_optimizer

    meta_graph = tf.compat.v1.MetaGraphDef(graph_def=graph_def)
    meta_graph.collection_def["train_op"].node_list.value.extend(fetches)
    config = tf.compat.v1.ConfigProto()
    options = config.graph_options.rewrite_options
    options.optimizers.extend(["constfold", "dependency"])
    options.min_graph_nodes = -1
    return _prune(tf_optimizer.OptimizeGraph(config, meta_graph), fetches)


def _prune(graph_def, fetches):
    """Removes control edges, which order side effects, and the nodes that no output needs."""
    for node in graph_def.node:
        data = [source for source in node.input if not source.startswith("^")]
        del node.input[:]
        node.input.extend(data)
    nodes = {node.name: node for node in graph_def.node}
    needed, stack = set(), [_node_name(name) for name in fetches]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += [_node_name(source) for source in nodes[name].input]
    return _replace_nodes(graph_def, [node for node in graph_def.node if node.name in needed])


def _replace_nodes(graph_def, nodes):
    return type(graph_def)(node=nodes, versions=graph_def.versions, library=graph_def.library)


# === Rewriting ===


class _Graph:
    """A GraphDef that can be rewritten: nodes, consumers and large weights by name."""

    def __init__(self, graph_def, weights: dict):
        self.weights = weights
        self.nodes = {node.name: node for node in graph_def.node}
        self.consumers = {name: [] for name in self.nodes}
        for node in graph_def.node:
            for source in node.input:
                self.consumers[_node_name(source)].append(node)

    def constant(self, source: str):
        """Returns the value of a constant, None for any other tensor."""
        import tensorflow as tf

        node = self.nodes[_node_name(source)]
        while node.op == "Identity":
            node = self.nodes[_node_name(node.input[0])]
        if node.name in self.weights:
            return np.asarray(self.weights[node.name])
        return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None

    def add_constant(self, name: str, value) -> str:
        return self._add(_weight_node(self._unused(name), value, self.weights))

    def add_node(self, op: str, name: str, inputs, **attributes) -> str:
        """Adds a node and returns its name; attributes are `AttrValue`s or `tf.DType`s."""
        import tensorflow as tf

        node = tf.compat.v1.NodeDef(op=op, name=self._unused(name), input=inputs)
        for key, value in attributes.items():
            if isinstance(value, tf.DType):
                node.attr[key].type = value.as_datatype_enum
            else:
                node.attr[key].CopyFrom(value)
        return self._add(node)

    def _unused(self, name: str) -> str:
        unique, number = name, 0
        while unique in self.nodes:
            number += 1
            unique = f"{name}_{number}"
        return unique

    def _add(self, node) -> str:
        self.nodes[node.name] = node
        self.consumers[node.name] = []
        for source in node.input:
            self.consumers[_node_name(source)].append(node)
        return node.name

    def set_input(self, node, index: int, source: str) -> None:
        self.consumers[_node_name(node.input[index])].remove(node)
        node.input[index] = source
        self.consumers[_node_name(source)].append(node)

    def fold_scales_and_offsets(self) -> None:
        """Folds multiplications and additions of channel constants into the operation before."""
        for node in list(self.nodes.values()):
            if node.op in LINEAR and not _is_channels_first(node):
                self._fold_into(node)

    def _fold_into(self, node) -> None:
        kernel = None if _attribute(node, "transpose_a").b else self.constant(node.input[1])
        if kernel is None:
            return
        axes = _output_axes(node, kernel)
        channels = int(np.prod([kernel.shape[axis] for axis in axes]))
        rank = 2 if node.op == "MatMul" else 4
        scale, offset, last = np.ones(channels), np.zeros(channels), node
        while step := self._next_affine(last, channels, rank):
            last, factor, addend = step
            scale, offset = scale * factor, offset * factor + addend
        if last is node:
            return
        shape = [kernel.shape[axis] if axis in axes else 1 for axis in range(kernel.ndim)]
        folded = (kernel * scale.reshape(shape)).astype(kernel.dtype)
        self.set_input(node, 1, self.add_constant(f"{node.name}/folded_kernel", folded))
        result = node.name
        if np.any(offset):
            bias = self.add_constant(f"{node.name}/folded_bias", offset.astype(kernel.dtype))
            inputs = [node.name, bias]
            result = self.add_node("BiasAdd", f"{node.name}/folded", inputs, T=node.attr["T"])
        for consumer in list(self.consumers[last.name]):
            for i, source in enumerate(consumer.input):
                if source == last.name:
                    self.set_input(consumer, i, result)

    def _next_affine(self, node, channels: int, rank: int):
        """Returns (consumer, factor, addend) if the only consumer is y = x * factor + addend."""
        consumers = self.consumers[node.name]
        if len(consumers) != 1:
            return None
        (consumer,) = consumers
        if consumer.op not in ("BiasAdd", "AddV2", "Mul", "Sub") or _is_channels_first(consumer):
            return None
        own = [i for i, source in enumerate(consumer.input) if source == node.name]
        if own != [0] and (consumer.op == "Sub" or len(own) != 1):
            return None
        value = self.constant(consumer.input[1 - own[0]])
        if value is None or value.size not in (1, channels) or value.ndim > rank:
            return None  # not one value per channel, or broadcasting would add axes
        if value.size > 1 and value.shape[-1] != channels:
            return None  # not along the last axis
        value = value.reshape(-1).astype("float64")
        if consumer.op == "Mul":
            return consumer, value, 0.0
        return consumer, 1.0, -value if consumer.op == "Sub" else value

    def reduce_precision(self, dtype) -> None:
        """Runs the operations of `REDUCED` in `dtype`, with casts at the borders."""
        import tensorflow as tf

        exact = self._positions()
        # A dictionary keeps the order, so that a model is always exported to the same file.
        chosen = dict.fromkeys(
            name
            for name, node in self.nodes.items()
            if node.op in REDUCED
            and name not in exact
            and _attribute(node, "T").type == tf.float32.as_datatype_enum
        )
        casts = {}
        for name in chosen:
            node = self.nodes[name]
            node.attr["T"].type = dtype.as_datatype_enum
            for i in range(len(node.input))[REDUCED[node.op]]:
                if _node_name(node.input[i]) not in chosen:
                    self.set_input(node, i, self._cast(node.input[i], tf.float32, dtype, casts))
        for name in chosen:
            for consumer in list(self.consumers[name]):
                if consumer.name in chosen or consumer.name in casts.values():
                    continue
                for i, source in enumerate(consumer.input):
                    if _node_name(source) == name:
                        self.set_input(consumer, i, self._cast(source, dtype, tf.float32, casts))

    def _positions(self) -> set:
        """Nodes between the convolutions and a cast to integers: positions in a feature map."""
        import tensorflow as tf

        casts = [n for n in self.nodes.values() if n.op == "Cast"]
        stack = [n.input[0] for n in casts if n.attr["DstT"].type == tf.int32.as_datatype_enum]
        found = set()
        while stack:
            node = self.nodes[_node_name(stack.pop())]
            if node.name not in found and node.op not in (*LINEAR, "BiasAdd"):
                found.add(node.name)
                stack += node.input
        return found

    def _cast(self, source: str, before, after, casts: dict) -> str:
        """Returns the tensor in another type; `casts` holds earlier results."""
        key = source, after
        if key not in casts:
            name, value = f"{source.replace(':', '_')}/{after.name}", self.constant(source)
            if value is not None:
                casts[key] = self.add_constant(name, value.astype(after.as_numpy_dtype))
            else:
                casts[key] = self.add_node("Cast", name, [source], SrcT=before, DstT=after)
        return casts[key]


def _node_name(source: str) -> str:
    return source.split(":")[0]


def _attribute(node, name: str):
    """Returns an attribute, empty if the node lacks it (`node.attr[name]` would add it)."""
    import tensorflow as tf

    return node.attr[name] if name in node.attr else tf.compat.v1.AttrValue()


def _is_channels_first(node) -> bool:
    return _attribute(node, "data_format").s == b"NCHW"


def _output_axes(node, kernel) -> tuple[int, ...]:
    """Returns the axes of a kernel that make up the output channels."""
    if node.op == "DepthwiseConv2dNative":
        return 2, 3
    if node.op == "Conv2DBackpropInput":
        return (2,)
    if node.op == "MatMul" and _attribute(node, "transpose_b").b:
        return (0,)
    return (kernel.ndim - 1,)
