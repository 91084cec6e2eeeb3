//! The metadata in the older formats that the official SDKs read: 15, and 14 for the oldest.

use scale_info::form::PortableForm;
use subxt::ext::codec::{Decode, Encode};
use subxt::ext::frame_metadata::v16::RuntimeMetadataV16;
use subxt::ext::frame_metadata::{RuntimeMetadata, RuntimeMetadataPrefixed, v14, v15, v16};

type Form = PortableForm;
type TypeId = <Form as scale_info::form::Form>::Type;
/// The version of extrinsics that these formats name.
const EXTRINSIC: u8 = 4;

/// Format 15 of metadata in format 16; `None` where it is in another one.
pub fn v15_of(bytes: &[u8]) -> Option<Vec<u8>> {
    let metadata = read(bytes)?;
    let extensions = extensions(&metadata);
    let v16::ExtrinsicMetadata { address_ty, call_ty, signature_ty, .. } = metadata.extrinsic;
    let unit = unit(&metadata);
    let extrinsic = v15::ExtrinsicMetadata {
        version: EXTRINSIC,
        address_ty,
        call_ty,
        signature_ty,
        // Neither is in format 16, and nobody reads them.
        extra_ty: unit,
        signed_extensions: extensions,
    };
    let mut pallets: Vec<_> = metadata.pallets.into_iter().map(pallet).collect();
    add_consensus(&metadata.types, &mut pallets);
    let old = v15::RuntimeMetadataV15 {
        pallets,
        extrinsic,
        ty: unit,
        apis: metadata.apis.into_iter().map(api).collect(),
        outer_enums: metadata.outer_enums,
        custom: metadata.custom,
        types: metadata.types,
    };
    Some(RuntimeMetadataPrefixed::from(old).encode())
}

/// Format 14 of metadata in format 16, likewise. It has no runtime calls.
pub fn v14_of(bytes: &[u8]) -> Option<Vec<u8>> {
    let metadata = read(bytes)?;
    let unit = unit(&metadata);
    let extensions = extensions(&metadata).into_iter().map(|old| v14::SignedExtensionMetadata {
        identifier: old.identifier,
        ty: old.ty,
        additional_signed: old.additional_signed,
    });
    let old = v14::RuntimeMetadataV14 {
        extrinsic: v14::ExtrinsicMetadata {
            ty: unit,
            version: EXTRINSIC,
            signed_extensions: extensions.collect(),
        },
        pallets: metadata.pallets.into_iter().map(|new| older(pallet(new))).collect(),
        ty: unit,
        types: metadata.types,
    };
    Some(RuntimeMetadataPrefixed::from(old).encode())
}

/// Runtimes from 435 on say by which consensus a subnet runs, and bittensor 11.3 sets no weights
/// without reading that. Here it is a number, 0 by default: the first kind, Yuma.
fn add_consensus(types: &scale_info::PortableRegistry, pallets: &mut [v15::PalletMetadata<Form>]) {
    let of_subnets = pallets.iter_mut().find(|pallet| pallet.name == "SubtensorModule");
    let Some(storage) = of_subnets.and_then(|pallet| pallet.storage.as_mut()) else { return };
    let is_byte = |ty: &&scale_info::PortableType| {
        ty.ty.type_def == scale_info::TypeDef::Primitive(scale_info::TypeDefPrimitive::U8)
    };
    let byte = types.types.iter().find(is_byte).unwrap().id.into();
    let Some(tempo) = storage.entries.iter().find(|entry| entry.name == "Tempo") else { return };
    let v14::StorageEntryType::Map { hashers, key, .. } = tempo.ty.clone() else { return };
    storage.entries.push(v15::StorageEntryMetadata {
        name: "SubnetEpochConsensus".into(),
        modifier: v14::StorageEntryModifier::Default,
        ty: v14::StorageEntryType::Map { hashers, key, value: byte },
        default: vec![0],
        docs: Vec::new(),
    });
}

fn read(mut bytes: &[u8]) -> Option<RuntimeMetadataV16> {
    match RuntimeMetadataPrefixed::decode(&mut bytes).ok()?.1 {
        RuntimeMetadata::V16(metadata) => Some(metadata),
        _ => None,
    }
}

/// The type of an empty tuple.
fn unit(metadata: &RuntimeMetadataV16) -> TypeId {
    let is_unit = |ty: &&scale_info::PortableType| match &ty.ty.type_def {
        scale_info::TypeDef::Tuple(tuple) => tuple.fields.is_empty(),
        _ => false,
    };
    metadata.types.types.iter().find(is_unit).unwrap().id.into()
}

/// Those of version 4 of extrinsics, in their order.
fn extensions(metadata: &RuntimeMetadataV16) -> Vec<v15::SignedExtensionMetadata<Form>> {
    let known = &metadata.extrinsic.transaction_extensions;
    known
        .iter()
        .map(|new| v15::SignedExtensionMetadata {
            identifier: new.identifier.clone(),
            ty: new.ty,
            additional_signed: new.implicit,
        })
        .collect()
}

fn pallet(new: v16::PalletMetadata<Form>) -> v15::PalletMetadata<Form> {
    let storage = |new: v16::PalletStorageMetadata<Form>| v15::PalletStorageMetadata {
        prefix: new.prefix,
        entries: new.entries.into_iter().map(entry).collect(),
    };
    let constant = |new: v16::PalletConstantMetadata<Form>| v15::PalletConstantMetadata {
        name: new.name,
        ty: new.ty,
        value: new.value,
        docs: new.docs,
    };
    v15::PalletMetadata {
        name: new.name,
        storage: new.storage.map(storage),
        calls: new.calls.map(|calls| v15::PalletCallMetadata { ty: calls.ty }),
        event: new.event.map(|event| v15::PalletEventMetadata { ty: event.ty }),
        constants: new.constants.into_iter().map(constant).collect(),
        error: new.error.map(|error| v15::PalletErrorMetadata { ty: error.ty }),
        index: new.index,
        docs: new.docs,
    }
}

fn entry(new: v16::StorageEntryMetadata<Form>) -> v15::StorageEntryMetadata<Form> {
    v15::StorageEntryMetadata {
        name: new.name,
        modifier: new.modifier,
        ty: new.ty,
        default: new.default,
        docs: new.docs,
    }
}

fn api(new: v16::RuntimeApiMetadata<Form>) -> v15::RuntimeApiMetadata<Form> {
    let method = |new: v16::RuntimeApiMethodMetadata<Form>| v15::RuntimeApiMethodMetadata {
        name: new.name,
        inputs: new.inputs,
        output: new.output,
        docs: new.docs,
    };
    v15::RuntimeApiMetadata {
        name: new.name,
        methods: new.methods.into_iter().map(method).collect(),
        docs: new.docs,
    }
}

fn older(new: v15::PalletMetadata<Form>) -> v14::PalletMetadata<Form> {
    v14::PalletMetadata {
        name: new.name,
        storage: new.storage,
        calls: new.calls,
        event: new.event,
        constants: new.constants,
        error: new.error,
        index: new.index,
    }
}
