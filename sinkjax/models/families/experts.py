"""What the families with experts share: their rows, which llama.cpp names alike for all."""

from sinkjax.models.families.common import Weight, block, transposed


def experts(router: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The rows of a layer's router and experts, from their Hugging Face names, `{x}` in each for
    the number of an expert. A GGUF file has the experts of a layer in one tensor."""
    return (
        block("mlp.router", transposed, router, "ffn_gate_inp.weight"),
        block("mlp.gate", transposed, gate, "ffn_gate_exps.weight"),
        block("mlp.up", transposed, up, "ffn_up_exps.weight"),
        block("mlp.down", transposed, down, "ffn_down_exps.weight"),
    )


# As Mixtral, whose GGUF files say `llama`, names them.
MIXTRAL = experts(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{x}.w1.weight",
    "block_sparse_moe.experts.{x}.w3.weight",
    "block_sparse_moe.experts.{x}.w2.weight",
)
