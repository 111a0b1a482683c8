"""Every mended defect is there in stock LMDeploy 0.11.0 and gone with the patches; every hook is called.

Each tree is probed by one process of its own; see tests/support/lmdeploy_patches_probes.py.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.support.lmdeploy_patches import Probes, apply_patches, copy_of_stock

DEFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # probe: what stock LMDeploy does, what the patched one does
    "defect_1_prefix_caching_ends_the_migration_loop": (
        {"raised": "AttributeError", "message": "'list' object has no attribute 'logical_blocks'"},
        {"migrating": [1]},
    ),
    "defect_2_quantised_migration_offsets": (
        {"right_bytes_by_quant_policy": {"0": True, "4": False, "8": False}},
        {"right_bytes_by_quant_policy": {"0": True, "4": True, "8": True}},
    ),
    "defect_3_failed_transfer_ends_the_engine": (
        {"engine_alive": False, "status": ["RUNNING_MIGRATION"] * 2, "blocks": [4, 4], "told_to_free": []},
        {"engine_alive": True, "status": ["WAITING", "MIGRATION_DONE"], "blocks": [0, 4], "told_to_free": [1, 2]},
    ),
    "defect_4_prefill_role_fills_no_trie": ({"reused_tokens": 0}, {"reused_tokens": 12}),
    "defect_5_lru_in_whole_seconds": ({"older_first": False}, {"older_first": True}),
    "defect_6_disconnect_does_nothing": ({"sockets_closed": False}, {"sockets_closed": True}),
    "defect_6_peers_are_unpickled": ({"executed": True, "freed": []}, {"executed": False, "freed": [7]}),
}

HOOKS: dict[str, dict[str, Any]] = {
    "hook_registry": {"environment": True, "entry_point": True},
    "hook_fetch_and_store": {"calls": ["fetch 1", "store 1", "fetch 2"], "reused": 12, "replaced": True},
    "hook_block_manager_and_eviction": {"seen": [16, "recompute"], "scheduled": 0},
    "hook_on_evict": {"told": [[8, 9, 10, 11], [4, 5, 6, 7]], "references": [1, 1]},
    "hook_block_info_and_migration": {
        "moved": [[0, 2], [1, 3]],
        "physical": [2, 3],
        "ref_count": [2, 1],
        "refused_without_moving": True,
        "every_block_once": True,
    },
    "hook_policy_and_plan": {"policy": [3, 2, 1], "plan": [2], "should_prefill": [True]},
    "hook_victims": {"stock": [1], "policy": [2]},
    "hook_migration_skips_cached_blocks": {"remote_blocks": [[0, 1, 2, 3], [3]]},
    "hook_custom_migration_backend": {"regions": ["0", "1", "2", "3"]},
    "hook_on_kv_written": {
        "order": ["written", "told"],
        "caches": ["k cache", "v cache", "metadata"],
        "output": [1.0],
    },
    "hook_on_collective": {"calls": [["all_reduce", 16], ["broadcast", 16]]},
}

ENTRY_POINT = "[lmdeploy.extensions]\nprobe = tests.support.lmdeploy_patches_plugin:from_entry_point\n"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every probe saw on the stock tree and on the patched overlay."""
    stock, overlay = copy_of_stock(tmp_path_factory.mktemp("stock")), tmp_path_factory.mktemp("overlay")
    applied = apply_patches("--overlay", overlay)
    assert applied.returncode == 0, applied.stderr
    plugin = overlay / "probe_plugin-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: probe-plugin\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text(ENTRY_POINT)
    from_environment = "tests.support.lmdeploy_patches_plugin:from_environment"
    on_stock = Probes(stock, *DEFECTS)
    on_overlay = Probes(overlay, *HOOKS, *DEFECTS, LMDEPLOY_EXTENSIONS=from_environment)
    results = on_stock.result(), on_overlay.result()
    shutil.rmtree(stock)
    return results


@pytest.mark.parametrize("probe", DEFECTS)
def test_defect_is_mended(probe: str, seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    stock, patched = seen
    assert (stock[probe], patched[probe]) == DEFECTS[probe]


@pytest.mark.parametrize("probe", HOOKS)
def test_hook_is_called(probe: str, seen: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert seen[1][probe] == HOOKS[probe]
