"""Asks the chain with the official SDK, as any validator on it would.

usage: subtensor_sdk.py CHAIN_URL MINER_HOTKEY VALIDATOR_HOTKEY

Reads the metagraph, the neurons, one neuron and the hyperparameters, sets weights with the hotkey
of the wallet `validator`, and reads them back.
"""

import asyncio
import sys

import bittensor
from bittensor.intents import SetWeights

NETUID = 4
NEURONS = "NeuronInfoRuntimeApi"
SUBNETS = "SubnetInfoRuntimeApi"


async def main(url, miner, validator):
    alone = {"fallback_endpoints": [], "archive_endpoints": []}
    async with bittensor.Client(url, **alone) as client:
        graph = await client.subnets.metagraph(NETUID)
        assert list(graph.hotkeys) == [miner, validator], graph
        assert [n.validator_permit for n in graph.neurons] == [False, True], graph.neurons
        assert graph.neurons[1].total_stake.rao == 20_000 * 10**9, graph.neurons[1]
        lite = await client.runtime((NEURONS, "get_neurons_lite"), [NETUID])
        assert [neuron["hotkey"] for neuron in lite] == [miner, validator], lite
        one = await client.runtime((NEURONS, "get_neuron"), [NETUID, 1])
        assert one["hotkey"] == validator and one["validator_permit"], one
        rules = await client.runtime((SUBNETS, "get_subnet_hyperparams_v2"), [NETUID])
        assert rules["tempo"] == 360, rules
        assert await client.hyperparameters.weights_rate_limit(NETUID) == 100
        wallet = bittensor.Wallet("validator", "default")
        weights = {0: 1.0, 1: 0.25}
        done = await client.execute(SetWeights(netuid=NETUID, weights=weights), wallet)
        assert done.success, done
        stored = await client.query(("SubtensorModule", "Weights"), [NETUID, 1])
        assert [tuple(pair) for pair in stored] == [(0, 65535), (1, 16384)], stored
    print(f"bittensor {bittensor.__version__}: metagraph, neurons, hyperparameters read; weights set")


asyncio.run(main(*sys.argv[1:]))
