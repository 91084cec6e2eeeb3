//! Signed extrinsics: what they call, and whether their signature holds.

use super::Call;
use super::runtime::{Hash, Runtime, TX_VERSION, blake2_256};
use scale_value::scale::decode_as_type;
use scale_value::{Composite, Primitive, Value, ValueDef};
use schnorrkel::{PublicKey, Signature};
use serde_json::Value as Json;
use subxt::ext::codec::{Compact, Decode, Encode};
use subxt::ext::frame_decode::extrinsics::decode_extrinsic;
use subxt::ext::scale_type_resolver::{
    PathIter, Primitive as Kind, ResolvedTypeVisitor, TypeResolver, UnhandledKind,
};
use subxt::utils::Era;

/// A longer payload is signed by its hash.
const PAYLOAD_MAX: usize = 256;

pub struct Extrinsic {
    pub call: Call,
    pub nonce: u64,
    pub era: Era,
    signature: [u8; 64],
    /// The call and the extensions' values, as they are signed.
    body: Vec<u8>,
    extensions: Vec<String>,
}

impl Extrinsic {
    /// From the bytes that are submitted: version 4, signed with sr25519.
    pub fn read(runtime: &Runtime, bytes: &[u8]) -> Result<Self, String> {
        let types = runtime.metadata.types();
        let read = decode_extrinsic(&mut &*bytes, &runtime.metadata, types);
        let read = read.map_err(|e| e.to_string())?;
        let signed = read.signature_payload().ok_or("it is not signed")?;
        let [0, signer @ ..] = &bytes[signed.address_range()] else {
            return Err("its address is not an account".into());
        };
        let [1, signature @ ..] = &bytes[signed.signature_range()] else {
            return Err("its signature is not sr25519".into());
        };
        let extra = read.transaction_extension_payload().ok_or("it has no extensions")?;
        let extension = |name: &str| {
            let found = extra.iter().find(|e| e.name() == name);
            found.map(|e| &bytes[e.range()]).ok_or_else(|| format!("it has no {name}"))
        };
        let nonce = Compact::<u64>::decode(&mut extension("CheckNonce")?);
        let era = Era::decode(&mut extension("CheckMortality")?);
        let mut body = bytes[read.call_data_range().start..].to_vec();
        body.extend_from_slice(&bytes[extra.range()]);
        let mut args = serde_json::Map::new();
        for arg in read.call_data() {
            let value = decode_as_type(&mut &bytes[arg.range()], *arg.ty(), types);
            let value = value.map_err(|e| e.to_string())?;
            args.insert(arg.name().to_owned(), json(&value, types));
        }
        let call = Call {
            signer: signer.try_into().map_err(|_| "its account is not 32 bytes")?,
            pallet: read.pallet_name().to_owned(),
            name: read.call_name().to_owned(),
            args: Json::Object(args),
        };
        Ok(Self {
            call,
            nonce: nonce.map_err(|e| e.to_string())?.0,
            era: era.map_err(|e| e.to_string())?,
            signature: signature.try_into().map_err(|_| "its signature is not 64 bytes")?,
            body,
            extensions: extra.iter().map(|e| e.name().to_owned()).collect(),
        })
    }

    /// Whether the signer signed it for this runtime, chain and first block of its era.
    pub fn verifies(&self, spec: u32, genesis: &Hash, birth: &Hash) -> bool {
        let mut payload = self.body.clone();
        for extension in &self.extensions {
            match extension.as_str() {
                "CheckSpecVersion" => spec.encode_to(&mut payload),
                "CheckTxVersion" => TX_VERSION.encode_to(&mut payload),
                "CheckGenesis" => payload.extend_from_slice(genesis),
                "CheckMortality" => payload.extend_from_slice(birth),
                // No hash of the metadata.
                "CheckMetadataHash" => payload.push(0),
                _ => {}
            }
        }
        if payload.len() > PAYLOAD_MAX {
            payload = blake2_256(&payload).to_vec();
        }
        let key = PublicKey::from_bytes(&self.call.signer);
        let signature = Signature::from_bytes(&self.signature);
        let (Ok(key), Ok(signature)) = (key, signature) else { return false };
        key.verify_simple(b"substrate", &payload, &signature).is_ok()
    }
}

/// Bytes as hexadecimal, structs by field name, wrappers of one unnamed field left out.
fn json<R: TypeResolver<TypeId = u32>>(value: &Value<u32>, types: &R) -> Json {
    match &value.value {
        ValueDef::Primitive(primitive) => json_of_primitive(primitive),
        ValueDef::BitSequence(bits) => Json::String(format!("{bits:?}")),
        ValueDef::Variant(variant) => {
            let fields = json_of_fields(&variant.values, types);
            Json::Object([(variant.name.clone(), fields)].into_iter().collect())
        }
        ValueDef::Composite(parts) => match visit(types, value.context, Element) {
            Some(element) if visit(types, element, IsByte) => {
                let byte = |part: &Value<u32>| part.as_u128().unwrap_or_default() as u8;
                Json::String(subxt::utils::to_hex(parts.values().map(byte).collect::<Vec<u8>>()))
            }
            Some(_) => Json::Array(parts.values().map(|part| json(part, types)).collect()),
            None => json_of_fields(parts, types),
        },
    }
}

fn json_of_fields<R: TypeResolver<TypeId = u32>>(fields: &Composite<u32>, types: &R) -> Json {
    match fields {
        Composite::Named(fields) => {
            let fields = fields.iter().map(|(name, value)| (name.clone(), json(value, types)));
            Json::Object(fields.collect())
        }
        Composite::Unnamed(fields) if fields.len() == 1 => json(&fields[0], types),
        Composite::Unnamed(fields) => {
            Json::Array(fields.iter().map(|value| json(value, types)).collect())
        }
    }
}

fn json_of_primitive(primitive: &Primitive) -> Json {
    match primitive {
        Primitive::Bool(value) => Json::Bool(*value),
        Primitive::String(value) => Json::String(value.clone()),
        Primitive::U128(value) => match u64::try_from(*value) {
            Ok(value) => value.into(),
            Err(_) => Json::String(value.to_string()),
        },
        Primitive::I128(value) => match i64::try_from(*value) {
            Ok(value) => value.into(),
            Err(_) => Json::String(value.to_string()),
        },
        other => Json::String(format!("{other:?}")),
    }
}

/// The type of a list's elements.
pub fn element(metadata: &subxt::Metadata, ty: u32) -> Option<u32> {
    visit(metadata.types(), ty, Element)
}

fn visit<'r, R, V>(types: &'r R, ty: u32, visitor: V) -> V::Value
where
    R: TypeResolver<TypeId = u32>,
    V: ResolvedTypeVisitor<'r, TypeId = u32>,
    V::Value: Default,
{
    types.resolve_type(ty, visitor).unwrap_or_default()
}

/// The type of a sequence's or array's elements.
struct Element;

impl<'r> ResolvedTypeVisitor<'r> for Element {
    type TypeId = u32;
    type Value = Option<u32>;

    fn visit_unhandled(self, _: UnhandledKind) -> Option<u32> {
        None
    }

    fn visit_sequence<Path: PathIter<'r>>(self, _: Path, element: u32) -> Option<u32> {
        Some(element)
    }

    fn visit_array(self, element: u32, _: usize) -> Option<u32> {
        Some(element)
    }
}

/// Whether a type is `u8`.
struct IsByte;

impl ResolvedTypeVisitor<'_> for IsByte {
    type TypeId = u32;
    type Value = bool;

    fn visit_unhandled(self, _: UnhandledKind) -> bool {
        false
    }

    fn visit_primitive(self, primitive: Kind) -> bool {
        primitive == Kind::U8
    }
}
