"""Health and reflection on every service, and calls made with nothing but what reflection tells (as grpcurl does)."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.support.cluster import RunningCluster

SERVICES = {
    "router": {"InferenceService", "TopologyService", "SessionService"},
    # Both roles' services: a running worker may change its role.
    "prefill-0": {"PrefillService", "DecodeService", "WorkerService", "KvTransferService", "SessionService"},
    "decode-0": {"PrefillService", "DecodeService", "WorkerService", "KvTransferService", "SessionService"},
    "kv-store-0": {"KvStoreService", "WorkerService", "KvTransferService"},
}
TIMEOUT_S = 20.0


@pytest.mark.parametrize("process_id", SERVICES)
def test_every_service_is_healthy_and_describes_itself(cluster: RunningCluster, process_id: str) -> None:
    with grpc.insecure_channel(cluster.address(process_id)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        ours = {name.removeprefix("sagellm.v1.") for name in database.get_services() if name.startswith("sagellm")}
        assert ours == SERVICES[process_id]
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *(f"sagellm.v1.{name}" for name in ours)):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_generation_with_nothing_but_reflection(cluster: RunningCluster) -> None:
    with grpc.insecure_channel(cluster.address("router")) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("sagellm.v1.InferenceService").FindMethodByName("Generate")
        request = GetMessageClass(method.input_type)(
            prompt_token_ids=b"".join(n.to_bytes(4, "little") for n in range(10, 40)),
            sampling={"max_new_tokens": 6, "ignore_eos": True},
        )
        call = channel.unary_stream(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answers = list(call(request, timeout=TIMEOUT_S))
    assert sum(len(answer.token_ids) // 4 for answer in answers) == 6
    assert [answer.index for answer in answers] == sorted(answer.index for answer in answers)
    assert answers[-1].summary.kv_bytes_transferred > 0
    assert len(answers[-1].summary.plan.nodes) >= 3
