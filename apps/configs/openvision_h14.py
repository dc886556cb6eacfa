"""OpenVision H/14: 84 and 224 px in one run; arguments: openvision_curriculum.py."""

import functools

from apps.configs import openvision_curriculum

get_config = functools.partial(openvision_curriculum.get_config, model="H/14")
