"""The conflict study: what mixing domains costs, and which way of training gets it back (LLaVA-MoLE, 2401.16160).

    mllm conflict train/configs/conflict.yaml run.arms=main      # a second time beside it, and both share the runs
    mllm conflict train/configs/conflict.yaml --report           # the tables again, from kept runs alone
    mllm conflict --report-all FOLDER                            # one table over several regimes

Every arm (arms.py) is a way of training on the same samples in the same order, or the base as it is. Its learning rate
is the best of one grid on validation, with seeds of their own; then paired seeds are trained at that rate and scored on
test, once. Arms of run.only_tuned stop before that.

  score     share of answers right to the letter: by teacher forcing every answer token, its end included, must be the
            most probable one, which is what greedy decoding would then answer. Mean over domains.
  conflict  each domain's own LoRA (`single`) minus one LoRA on the mix (`mix`)
  recovery  (arm - mix) / conflict; told only where the interval of conflict lies above zero
  interval  95 %, bootstrap over seeds and pictures together; p corrected by Holm over arms; t over seeds beside it
"""
