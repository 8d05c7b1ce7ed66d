"""The deployment graph: one frozen TensorFlow graph in which nothing is left of training."""

import contextlib

import keras
import numpy as np

PRECISIONS = ("float32", "bfloat16", "float16")
# What a scale and an offset behind it can be folded into.
_LINEAR = ("Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "MatMul")
# Operations that are done in a reduced precision. Everything else, softmax and the length of
# vectors above all, stays in float32.
_REDUCED = (
    *_LINEAR,
    "BiasAdd",
    "AddV2",
    "Mul",
    "Relu",
    "Relu6",
    "MaxPool",
    "AvgPool",
    "Pad",
    "Split",
    "ConcatV2",
    "Reshape",
    "Transpose",
    "Squeeze",
    "StridedSlice",
)

_LARGE = 2**14  # bytes of a constant


def deployment_function(network, specification, precision: str = "float32"):
    """A function of one tensor as one frozen, folded graph.

    Variables become constants, batch normalization is folded into the convolution before it,
    dropout and other things of training are gone, and what follows a convolution stands in the
    order that TensorFlow fuses at run time (convolution, bias, addition, ReLU).

    Args:
        network: function of one tensor that returns a dictionary of tensors, for instance
            `lambda images: model(images, training=False)`.
        specification: `tf.TensorSpec` of its argument, with a name.
        precision: `"float32"`, or `"bfloat16"` or `"float16"`: convolutions and what lies
            between them are done so; argument and results stay as they are.

    Returns:
        A `tf.ConcreteFunction` of the same argument with the same dictionary, float32.

    Raises:
        ValueError: if Keras does not run on TensorFlow, or `precision` is unknown.

    Example:

    >>> spec = tf.TensorSpec((None, 224, 224, 3), name="images")
    >>> fast = deployment_function(lambda x: {"predictions": model(x, training=False)}, spec)
    >>> fast(images)["predictions"]
    """
    check_backend()
    if precision not in PRECISIONS:
        raise ValueError(
            f"`precision` must be one of {', '.join(PRECISIONS)}. Received: {precision!r}"
        )
    import tensorflow as tf

    graph_def, outputs = _frozen(network, specification)
    graph_def = _constants_folded(graph_def, outputs.values())
    graph = _Graph(graph_def)
    graph.fold_scales_and_offsets()
    if precision != "float32":
        graph.reduce_precision(tf.as_dtype(precision))
    graph_def = _constants_folded(graph.finished(), outputs.values())
    return _function_of(graph_def, specification, outputs)


def _function_of(graph_def, specification, outputs: dict, variables=None):
    """Concrete function of a graph; `variables` are read in place of nodes, by their names."""
    import tensorflow as tf

    # The argument of the new function takes the place of the old one.
    _remove_node(graph_def, specification.name)

    def deployed(argument):
        values = {name: variable.read_value() for name, variable in (variables or {}).items()}
        values[specification.name] = argument
        tensors = tf.graph_util.import_graph_def(
            graph_def,
            input_map={f"{name}:0": value for name, value in values.items()},
            return_elements=list(outputs.values()),
            name="network",
        )
        return dict(zip(outputs, tensors, strict=True))

    return tf.function(deployed, autograph=False).get_concrete_function(specification)


def with_variables(function):
    """The function with its weights in variables instead of constants.

    TensorFlow copies the constants of a graph a dozen times while it loads and optimizes it.
    A variable exists once, for all functions that read it, but oneDNN brings it into its own
    order at every call, unless TF_ONEDNN_ASSUME_FROZEN_WEIGHTS=1 tells it that it never changes.

    Args:
        function: what `deployment_function` returns.

    Returns:
        A function of the same argument with the same results, and a list of `tf.Variable`.
    """
    import tensorflow as tf

    (specification,), _ = function.structured_input_signature
    keys = sorted(function.structured_outputs)
    outputs = {key: x.name for key, x in zip(keys, function.outputs, strict=True)}
    graph_def = tf.compat.v1.GraphDef()
    constants = _take_large_constants(function.graph.as_graph_def(), graph_def)
    variables = {
        name: tf.Variable(tf.make_ndarray(node.attr["value"].tensor), trainable=False)
        for name, node in constants.items()
    }
    function = _function_of(graph_def, specification, outputs, variables)
    return function, list(variables.values())


def check_backend() -> None:
    """Raises a ValueError if Keras does not run on TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Models are exported with the TensorFlow backend only. Received: "
            f"backend={keras.backend.backend()!r}. Save with model.save, set "
            "KERAS_BACKEND=tensorflow, load and export"
        )


@contextlib.contextmanager
def computing_in_float32(model):
    """Lets the layers of a model of mixed precision compute in float32, as its variables are.

    Its casts would stand between convolutions and what can be folded into them.
    """
    policies = [(layer, layer.dtype_policy) for layer in model._flatten_layers()]
    mixed = [(layer, p) for layer, p in policies if p.compute_dtype != p.variable_dtype]
    normalizations = [
        (layer, layer.mean, layer.variance)
        for layer, _ in mixed
        if isinstance(layer, keras.layers.Normalization)
    ]
    try:
        for layer, _ in mixed:
            layer.dtype_policy = "float32"
        for layer, *_ in normalizations:
            _set_exact_statistics(layer)
        yield
    finally:
        for layer, policy in mixed:
            layer.dtype_policy = policy
        for layer, mean, variance in normalizations:
            layer.mean, layer.variance = mean, variance


def _set_exact_statistics(layer: keras.layers.Normalization) -> None:
    """Keras keeps mean and variance rounded to the precision in which the layer computes."""
    if layer.input_mean is None:
        layer.finalize_state()
        return
    shape = layer.mean.shape
    layer.mean = np.resize(np.asarray(layer.input_mean, "float32"), shape)
    layer.variance = np.resize(np.asarray(layer.input_variance, "float32"), shape)


def _frozen(network, specification):
    """GraphDef without variables, and the names of its outputs by key."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    def in_float32(argument):
        return {name: tf.cast(x, tf.float32) for name, x in network(argument).items()}

    function = tf.function(in_float32, autograph=False).get_concrete_function(specification)
    keys = sorted(function.structured_outputs)  # the order in which TensorFlow flattens
    frozen = convert_variables_to_constants_v2(function)
    outputs = {key: tensor.name for key, tensor in zip(keys, frozen.outputs, strict=True)}
    return frozen.graph.as_graph_def(), outputs


def _constants_folded(graph_def, fetches):
    """TensorFlow's own folding: what depends on constants alone is computed once, here."""
    import tensorflow as tf
    from tensorflow.python.grappler import tf_optimizer

    meta_graph = tf.compat.v1.MetaGraphDef()
    kernels = _take_large_constants(graph_def, meta_graph.graph_def)
    meta_graph.collection_def["train_op"].node_list.value.extend(fetches)
    config = tf.compat.v1.ConfigProto()
    options = config.graph_options.rewrite_options
    options.optimizers.extend(["constfold", "dependency"])
    options.min_graph_nodes = -1
    folded = tf_optimizer.OptimizeGraph(config, meta_graph)
    for node in folded.node:
        if node.name in kernels:
            node.CopyFrom(kernels[node.name])
    return _reachable(folded, fetches)


def _reachable(graph_def, fetches):
    """The part of a graph that its outputs need, without what orders side effects: it has none."""
    for node in graph_def.node:
        data = [source for source in node.input if not source.startswith("^")]
        if len(data) < len(node.input):
            del node.input[:]
            node.input.extend(data)
    nodes = {node.name: node for node in graph_def.node}
    wanted, waiting = set(), [_node_name(name) for name in fetches]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += [_node_name(source) for source in nodes[name].input]
    result = type(graph_def)(versions=graph_def.versions, library=graph_def.library)
    result.node.extend(node for node in graph_def.node if node.name in wanted)
    return result


def _take_large_constants(graph_def, copy) -> dict:
    """Copies a graph without its kernels: they are not for folding, and TensorFlow copies much.

    Returns the nodes left out, by name; placeholders stand for them.
    """
    taken = {}
    copy.versions.CopyFrom(graph_def.versions)
    copy.library.CopyFrom(graph_def.library)
    for node in graph_def.node:
        if node.op == "Const" and node.ByteSize() > _LARGE:
            taken[node.name] = node
            new = copy.node.add(op="Placeholder", name=node.name)
            new.attr["dtype"].CopyFrom(node.attr["dtype"])
            new.attr["shape"].shape.CopyFrom(node.attr["value"].tensor.tensor_shape)
        else:
            copy.node.add().CopyFrom(node)
    return taken


class _Graph:
    """A GraphDef with what its rewriting needs: nodes by name, constants, consumers."""

    def __init__(self, graph_def):
        self.graph_def = graph_def
        self.nodes = {node.name: node for node in graph_def.node}
        self.consumers = {name: [] for name in self.nodes}
        for node in graph_def.node:
            for source in node.input:
                self.consumers[_node_name(source)].append(node)

    def finished(self):
        """The GraphDef with all nodes that were added."""
        result = type(self.graph_def)()
        result.CopyFrom(self.graph_def)
        del result.node[:]
        result.node.extend(self.nodes.values())
        return result

    def constant(self, source: str):
        """Value of a constant, None for any other tensor."""
        import tensorflow as tf

        node = self.nodes[_node_name(source)]
        while node.op == "Identity" and not source.startswith("^"):
            node = self.nodes[_node_name(node.input[0])]
        return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None

    def add_constant(self, name: str, value) -> str:
        import tensorflow as tf

        return self.add_node(
            "Const",
            name,
            [],
            value=tf.compat.v1.AttrValue(tensor=tf.make_tensor_proto(value)),
            dtype=_type_attribute(tf.as_dtype(value.dtype)),
        )

    def add_node(self, op: str, name: str, inputs, **attributes) -> str:
        import tensorflow as tf

        name = self._free_name(name)
        node = tf.compat.v1.NodeDef(op=op, name=name, input=inputs)
        for key, value in attributes.items():
            node.attr[key].CopyFrom(value)
        self.nodes[name] = node
        self.consumers[name] = []
        for source in inputs:
            self.consumers[_node_name(source)].append(node)
        return name

    def _free_name(self, name: str) -> str:
        number, free = 0, name
        while free in self.nodes:
            number += 1
            free = f"{name}_{number}"
        return free

    def set_input(self, node, position: int, source: str) -> None:
        self.consumers[_node_name(node.input[position])].remove(node)
        node.input[position] = source
        self.consumers[_node_name(source)].append(node)

    # === Scales and offsets ===

    def fold_scales_and_offsets(self) -> None:
        """Folds what multiplies and adds vectors of constants after a convolution into it."""
        for node in list(self.nodes.values()):
            if node.op in _LINEAR and not _is_channels_first(node):
                self._fold_into(node)

    def _fold_into(self, node) -> None:
        position, kernel = self._kernel_of(node)
        if kernel is None:
            return
        axes = _output_axes(node, kernel)
        channels = int(np.prod([kernel.shape[axis] for axis in axes]))
        rank = 2 if node.op == "MatMul" else 4
        scale, offset, last = np.ones(channels), np.zeros(channels), node
        while step := self._next_step(last, channels, rank):
            last, factor, addend = step
            scale, offset = scale * factor, offset * factor + addend
        if last is node:
            return
        shape = [kernel.shape[axis] if axis in axes else 1 for axis in range(kernel.ndim)]
        folded = (kernel * scale.reshape(shape)).astype(kernel.dtype)
        self.set_input(node, position, self.add_constant(f"{node.name}/folded_kernel", folded))
        result = node.name
        if np.any(offset):
            bias = self.add_constant(f"{node.name}/folded_bias", offset.astype(kernel.dtype))
            result = self.add_node(
                "BiasAdd", f"{node.name}/folded", [node.name, bias], T=node.attr["T"]
            )
        for consumer in list(self.consumers[last.name]):
            for i, source in enumerate(consumer.input):
                if source == last.name:
                    self.set_input(consumer, i, result)

    def _kernel_of(self, node):
        """Place and value of the constant kernel of a node."""
        position = 1
        if node.op == "MatMul" and _attribute(node, "transpose_a").b:
            return position, None
        return position, self.constant(node.input[position])

    def _next_step(self, node, channels: int, rank: int):
        """The only consumer, where it is y = x * factor + addend: (consumer, factor, addend)."""
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
            return None  # more axes would give the result more
        if value.size > 1 and value.shape[-1] != channels:
            return None  # not along the last axis
        value = value.reshape(-1).astype("float64")
        if consumer.op == "Mul":
            return consumer, value, 0.0
        return consumer, 1.0, -value if consumer.op == "Sub" else value

    # === Precision ===

    def reduce_precision(self, dtype) -> None:
        """Lets all nodes that can work in `dtype` do so; casts stand at the borders."""
        import tensorflow as tf

        float32 = tf.float32.as_datatype_enum
        # In order, so that the same model is always the same file.
        chosen = dict.fromkeys(
            name
            for name, node in self.nodes.items()
            if node.op in _REDUCED and _attribute(node, "T").type == float32
        )
        casts = {}
        for name in chosen:
            node = self.nodes[name]
            node.attr["T"].type = dtype.as_datatype_enum
            for i in _float_inputs(node):
                if _node_name(node.input[i]) not in chosen:
                    self.set_input(node, i, self._cast(node.input[i], tf.float32, dtype, casts))
        for name in chosen:
            for consumer in list(self.consumers[name]):
                if consumer.name in chosen or consumer.name in casts.values():
                    continue
                for i, source in enumerate(consumer.input):
                    if _node_name(source) == name and not source.startswith("^"):
                        self.set_input(consumer, i, self._cast(source, dtype, tf.float32, casts))

    def _cast(self, source: str, before, after, casts: dict) -> str:
        """The tensor in another type; constants and repeated casts are made once."""
        if (source, after) not in casts:
            name = f"{source.replace(':', '_')}/{after.name}"
            value = self.constant(source)
            if value is not None:
                casts[source, after] = self.add_constant(name, value.astype(after.as_numpy_dtype))
            else:
                types = {"SrcT": _type_attribute(before), "DstT": _type_attribute(after)}
                casts[source, after] = self.add_node("Cast", name, [source], **types)
        return casts[source, after]


def _remove_node(graph_def, name: str) -> None:
    index = [node.name for node in graph_def.node].index(name)
    del graph_def.node[index]


def _node_name(source: str) -> str:
    return source.removeprefix("^").split(":")[0]


def _type_attribute(dtype):
    import tensorflow as tf

    return tf.compat.v1.AttrValue(type=dtype.as_datatype_enum)


def _attribute(node, name: str):
    """An attribute, an empty one where there is none: `node.attr[name]` would add it."""
    import tensorflow as tf

    return node.attr[name] if name in node.attr else tf.compat.v1.AttrValue()


def _is_channels_first(node) -> bool:
    return _attribute(node, "data_format").s == b"NCHW"


def _output_axes(node, kernel) -> tuple[int, ...]:
    """Axes of a kernel that run over the output's channels."""
    if node.op == "DepthwiseConv2dNative":
        return 2, 3
    if node.op == "Conv2DBackpropInput":
        return (2,)
    if node.op == "MatMul" and _attribute(node, "transpose_b").b:
        return (0,)
    return (kernel.ndim - 1,)


def _float_inputs(node) -> range:
    """Places of the inputs that have the type of the node; the others are shapes and axes."""
    places = {
        "Conv2DBackpropInput": (1, 3),
        "ConcatV2": (0, len(node.input) - 1),
        "Split": (1, 2),
        "Pad": (0, 1),
        "Reshape": (0, 1),
        "Transpose": (0, 1),
        "StridedSlice": (0, 1),
        "Relu": (0, 1),
        "Relu6": (0, 1),
        "MaxPool": (0, 1),
        "AvgPool": (0, 1),
        "Squeeze": (0, 1),
    }
    start, stop = places.get(node.op, (0, 2))
    return range(start, stop)
