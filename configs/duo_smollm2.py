"""SmolLM2-135M on two CPU cores, in half an hour: short contexts, few steps."""

from sinkjax.training import GateTraining, Passkeys

CONFIG = GateTraining(
    model="smollm2-135m-instruct",
    lengths=(512, 768, 1024),
    steps=150,
    sinks=16,
    recent=112,
    task=Passkeys(count=4, words=8),
    remat=False,
    save_every=25,
)
