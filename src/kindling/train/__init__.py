"""Training on Spark: plan and launch (`fit`), pack and shuffle (`spool`), one worker (`worker`, `loop`), strategies."""
