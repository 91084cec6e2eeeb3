//! Answers of the runtime's own calls about the subnet, in the types that the metadata gives them:
//! zeros, in which what the fake knows is set by field name.

use super::extrinsic::element;
use super::runtime::{Runtime, axon, each, list, number, unit};
use super::weights::last_updates;
use super::{Neuron, Subnet};
use scale_info::{PortableRegistry, TypeDef};
use scale_value::{Composite, Value, ValueDef};
use subxt::ext::codec::{Compact, Decode, Encode};

/// The answer to a call such as `SubnetInfoRuntimeApi_get_metagraph`; `None` where the metadata or
/// the fake lacks it. Of another subnet there is nothing.
pub fn answer(
    runtime: &Runtime,
    subnet: &Subnet,
    block: u64,
    function: &str,
    input: &[u8],
) -> Option<Vec<u8>> {
    let (api, method) = function.split_once('_')?;
    let known = runtime.metadata.runtime_api_trait_by_name(api)?.method_by_name(method)?;
    let (ty, netuid) = (known.output_ty(), u16::decode(&mut &*input).ok()?);
    let is_here = netuid == subnet.netuid;
    let some = |fields: Fields| if is_here { some(runtime, ty, fields) } else { Some(vec![0]) };
    match (api, method) {
        ("SubnetInfoRuntimeApi", "get_metagraph" | "get_mechagraph") => {
            some(metagraph(subnet, block))
        }
        ("SubnetInfoRuntimeApi", "get_selective_metagraph" | "get_selective_mechagraph") => {
            match is_here {
                true => whole(runtime, ty, metagraph(subnet, block)),
                false => Some(vec![0]),
            }
        }
        ("SubnetInfoRuntimeApi", "get_subnet_hyperparams" | "get_subnet_hyperparams_v2") => {
            some(hyperparameters(subnet))
        }
        ("NeuronInfoRuntimeApi", "get_neuron" | "get_neuron_lite") => {
            let (_, uid) = <(u16, u16)>::decode(&mut &*input).ok()?;
            match subnet.neurons.get(usize::from(uid)) {
                Some(known) => some(neuron_fields(subnet, uid, known)),
                None => Some(vec![0]),
            }
        }
        ("NeuronInfoRuntimeApi", "get_neurons" | "get_neurons_lite") => {
            let neurons = (0..).zip(&subnet.neurons).filter(|_| is_here);
            let all = neurons.map(|(uid, known)| neuron_fields(subnet, uid, known));
            Some(sequence(runtime, ty, all.collect()))
        }
        _ => None,
    }
}

type Fields = Vec<(&'static str, Value)>;

/// `Some` of a struct of zeros in which these fields are set.
fn some(runtime: &Runtime, ty: u32, known: Fields) -> Option<Vec<u8>> {
    let mut value = runtime.zero(&[1], ty);
    set(inside(&mut value)?, known)?;
    Some(runtime.encode(&value, ty))
}

/// The same without an absent field.
fn whole(runtime: &Runtime, ty: u32, known: Fields) -> Option<Vec<u8>> {
    let mut value = runtime.zero(&[1], ty);
    let inner = inside(&mut value)?;
    set(inner, known)?;
    fill(runtime, inner, ty);
    Some(runtime.encode(&value, ty))
}

/// What is in a `Some`.
fn inside(value: &mut Value) -> Option<&mut Value> {
    let ValueDef::Variant(some) = &mut value.value else { return None };
    let Composite::Unnamed(inner) = &mut some.values else { return None };
    inner.first_mut()
}

/// Clients that ask for a part of a struct want that part, and do not mind the rest: fields that
/// may be absent are present, as zeros.
fn fill(runtime: &Runtime, value: &mut Value, option: u32) {
    let ValueDef::Composite(Composite::Named(fields)) = &mut value.value else { return };
    let types = runtime.metadata.types();
    let Some(TypeDef::Composite(of)) =
        inner_of(types, option).and_then(|ty| types.resolve(ty)).map(|ty| &ty.type_def)
    else {
        return;
    };
    for (field, (_, value)) in of.fields.iter().zip(fields) {
        let is_none = matches!(&value.value, ValueDef::Variant(v) if v.name == "None");
        if let Some(ty) = inner_of(types, field.ty.id).filter(|_| is_none) {
            *value = Value::unnamed_variant("Some", [runtime.zero(&[], ty)]);
        }
    }
}

/// The type in an option.
fn inner_of(types: &PortableRegistry, option: u32) -> Option<u32> {
    let TypeDef::Variant(variants) = &types.resolve(option)?.type_def else { return None };
    let some = variants.variants.iter().find(|variant| variant.name == "Some")?;
    Some(some.fields.first()?.ty.id)
}

/// A list of such structs.
fn sequence(runtime: &Runtime, ty: u32, all: Vec<Fields>) -> Vec<u8> {
    let of = element(&runtime.metadata, ty).unwrap();
    let mut bytes = Compact(all.len() as u32).encode();
    for known in all {
        let mut value = runtime.zero(&[], of);
        set(&mut value, known).unwrap();
        bytes.extend(runtime.encode(&value, of));
    }
    bytes
}

/// Fields come and go between versions; one that is missing is left out. Those that may be absent
/// are present.
fn set(value: &mut Value, known: Fields) -> Option<()> {
    let ValueDef::Composite(Composite::Named(fields)) = &mut value.value else { return None };
    for (name, new) in known {
        let Some((_, old)) = fields.iter_mut().find(|(known, _)| known == name) else { continue };
        let is_optional = matches!(&old.value, ValueDef::Variant(v) if v.name == "None");
        *old = if is_optional { Value::unnamed_variant("Some", [new]) } else { new };
    }
    Some(())
}

fn neuron_fields(subnet: &Subnet, uid: u16, neuron: &Neuron) -> Fields {
    let stake = list([Value::from_bytes(neuron.coldkey), number(neuron.stake_rao)]);
    vec![
        ("hotkey", Value::from_bytes(neuron.hotkey)),
        ("coldkey", Value::from_bytes(neuron.coldkey)),
        ("uid", number(uid)),
        ("netuid", number(subnet.netuid)),
        ("active", Value::bool(true)),
        ("axon_info", axon(neuron.axon.as_ref())),
        ("stake", list([stake])),
        ("emission", number(neuron.emission)),
        ("incentive", number(neuron.incentive)),
        ("consensus", number(neuron.consensus)),
        ("last_update", number(neuron.last_update)),
        ("validator_permit", Value::bool(neuron.permit)),
    ]
}

fn hyperparameters(subnet: &Subnet) -> Fields {
    vec![
        ("min_allowed_weights", number(subnet.min_allowed_weights)),
        ("max_weights_limit", number(subnet.max_weights_limit)),
        ("tempo", number(subnet.tempo)),
        ("weights_version", number(subnet.weights_version)),
        ("weights_rate_limit", number(subnet.weights_rate_limit)),
        ("serving_rate_limit", number(subnet.serving_rate_limit)),
        ("commit_reveal_period", number(subnet.commit_reveal_period)),
        ("commit_reveal_weights_enabled", Value::bool(subnet.commit_reveal)),
        ("registration_allowed", Value::bool(true)),
    ]
}

fn metagraph(subnet: &Subnet, block: u64) -> Fields {
    let epoch = u64::from(subnet.tempo) + 1;
    let last_step = block / epoch * epoch;
    vec![
        ("netuid", number(subnet.netuid)),
        ("name", Value::from_bytes(&subnet.name)),
        ("block", number(block)),
        ("tempo", number(subnet.tempo)),
        ("last_step", number(last_step)),
        ("blocks_since_last_step", number(block - last_step)),
        ("min_allowed_weights", number(subnet.min_allowed_weights)),
        ("max_weights_limit", number(subnet.max_weights_limit)),
        ("weights_version", number(subnet.weights_version)),
        ("weights_rate_limit", number(subnet.weights_rate_limit)),
        ("num_uids", number(subnet.neurons.len() as u16)),
        ("max_uids", number(subnet.max_uids)),
        ("serving_rate_limit", number(subnet.serving_rate_limit)),
        ("commit_reveal_weights_enabled", Value::bool(subnet.commit_reveal)),
        ("commit_reveal_period", number(subnet.commit_reveal_period)),
        ("registration_allowed", Value::bool(true)),
        ("hotkeys", each(subnet, |n| Value::from_bytes(n.hotkey))),
        ("coldkeys", each(subnet, |n| Value::from_bytes(n.coldkey))),
        ("identities", each(subnet, |_| unit("None"))),
        ("axons", each(subnet, |n| axon(n.axon.as_ref()))),
        ("active", each(subnet, |_| Value::bool(true))),
        ("validator_permit", each(subnet, |n| Value::bool(n.permit))),
        ("pruning_score", each(subnet, |_| number(0_u16))),
        ("last_update", list(last_updates(subnet, 0).into_iter().map(number))),
        ("emission", each(subnet, |n| number(n.emission))),
        ("dividends", each(subnet, |_| number(0_u16))),
        ("incentives", each(subnet, |n| number(n.incentive))),
        ("consensus", each(subnet, |n| number(n.consensus))),
        ("trust", each(subnet, |_| number(0_u16))),
        ("rank", each(subnet, |_| number(0_u16))),
        ("block_at_registration", each(subnet, |_| number(0_u64))),
        ("alpha_stake", each(subnet, |n| number(n.stake_rao))),
        ("tao_stake", each(subnet, |_| number(0_u64))),
        ("total_stake", each(subnet, |n| number(n.stake_rao))),
    ]
}
