"""Made-up contents of events, for trying an endpoint. The ids in them lead nowhere."""

from __future__ import annotations

from typing import Any

_ID = "sample"
_PREFIXES = {
    "fine_tuning.job": "ftjob_",
    "batch": "batch_",
    "response": "resp_",
    "eval.run": "evalrun_",
    "video": "video_",
    "agent.environment": "env_",
    "agent.session": "session_",
    "safety.alert": "alert_",
}
_MORE: dict[str, dict[str, Any]] = {
    "agent.session.action_required": {"required_action": {"type": "function_call"}},
    "agent.session.created": {"environment_type": "none"},
    "agent.session.in_progress": {"environment_type": "none"},
    "agent.session.idle": {"environment_type": "none"},
    "agent.session.failed": {"environment_type": "none"},
}


def sample(event_type: str) -> dict[str, Any]:
    """Return the `data` of a made-up event of a type, as OpenAI's SDKs describe it."""
    if event_type == "realtime.call.incoming":
        return {"call_id": f"rtc_{_ID}", "sip_headers": []}
    return {"id": _PREFIXES[event_type.rpartition(".")[0]] + _ID, **_MORE.get(event_type, {})}
