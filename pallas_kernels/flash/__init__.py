"""The attention that `sink_attention` and `block_sparse` share: one softmax over keys that a rule
grants and a block map lists. One folder, since one kernel serves both."""
