"""The Serve application and its deployment options, without a cluster."""

import pytest

from higgs_model.errors import BadConfig
from serve.deployments.settings import EndpointSettings

# Ray Serve emits deprecation warnings when it is first imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_arguments_configure_the_application(monkeypatch):
    from serve.app import app

    monkeypatch.setenv("HIGGS_API_KEYS", "secret")
    application = app({"model": "there", "max_batch": "8", "max_replicas": "3"})
    config, digests, _ = application._bound_deployment.init_args
    assert (config.model, config.max_batch) == ("there", 8)
    assert len(digests) == 1
    assert "secret" not in repr(application._bound_deployment.init_args)
    with pytest.raises(BadConfig, match="did you mean 'model'"):
        app({"modle": "x"})


def test_shutdown_timeout_exceeds_the_request_timeout():
    from serve.deployments import ingress, replica

    config = EndpointSettings(request_timeout_s=100)
    for options in (replica.deployment_options(config, 0.0), ingress.deployment_options(config)):
        assert options["graceful_shutdown_timeout_s"] > 100
    # ingress replicas must outlive the replicas from which they still receive responses.
    assert (
        ingress.deployment_options(config)["graceful_shutdown_timeout_s"]
        > replica.deployment_options(config, 0)["graceful_shutdown_timeout_s"]
    )


def test_autoscaling_starts_before_all_slots_are_in_use():
    from serve.deployments import replica

    options = replica.deployment_options(EndpointSettings(max_batch=16, min_replicas=1, max_replicas=4), 0.5)
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 12)
    assert options["max_ongoing_requests"] == 16
    assert options["ray_actor_options"]["num_gpus"] == 0.5
    assert replica.deployment_options(EndpointSettings(min_replicas=2, max_replicas=2), 0)["num_replicas"] == 2
