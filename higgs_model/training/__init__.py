"""Training: from recordings with transcripts to a checkpoint.

In the order in which a manifest row passes through:

    settings       all settings of a training run
    model_source   the model's configuration, tokenizer and weights, from a checkpoint or from scratch
    samples        a row as tokens with a loss mask; the prompts are those of `higgs_model.script`
    prepare        recordings to codes and 16 kHz samples, rows to shards of the `store`
    batch_sampler  sampling of references and turns, batching of sequences of similar length
    collator       a batch: delayed clips, labels, mel spectrograms, and index tensors
    objective      its losses
    trainer        the loop; uses `optimizer`, `workers`, `checkpoints`, `metrics_log` and `previews`

Does not depend on a cluster or on tables; `jobs.train` provides both.
"""
