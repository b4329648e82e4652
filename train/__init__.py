"""Training: one stage from one config. Stages with settings of their own make them known as the package loads."""

import train.moma.config  # noqa: F401
