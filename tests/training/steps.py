"""Settings of trainers whose steps can be done again by hand: plain SGD."""

RATE = 0.05
SGD = dict(
    learning_rate=RATE,
    optim="sgd",
    lr_scheduler_type="constant",
    max_grad_norm=0,
    per_device_train_batch_size=2,
    report_to=[],
    use_cpu=True,
    bf16=False,
    logging_steps=1,
    disable_tqdm=True,
)
