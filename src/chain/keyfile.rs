//! Reads and writes Bittensor key files: JSON with a key's secrets, plain or encrypted, and JSON
//! with its public part.
//!
//! The official tools write `$NACL`, a nonce of 24 bytes, and XSalsa20-Poly1305 over the JSON,
//! under Argon2i of a password with a fixed salt. Known traps: fields come in any order;
//! `cryptoType` may be absent (sr25519); one release wrote a corrupt `secretSeed`. So the secret is
//! taken from the first field that gives the address that the file names, and from none where they
//! disagree.
//!
//! Whatever holds a secret is wiped when it is dropped, and made in its final size: a buffer that
//! grows or shrinks would leave copies behind.

use super::keys::{AddressError, Hotkey, Keypair, PairError};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crypto_secretbox::aead::{Aead, KeyInit};
use crypto_secretbox::{Nonce, XSalsa20Poly1305};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;
use zeroize::Zeroizing;

const NACL: &[u8] = b"$NACL";
const NONCE_BYTES: usize = 24;
/// Prefixes of formats that older tools wrote.
const OLD: [(&[u8], &str); 2] = [(b"$ANSIBLE_VAULT", "Ansible Vault"), (b"gAAAAA", "Fernet")];
const SALT: [u8; 16] = [
    0x13, 0x71, 0x83, 0xdf, 0xf1, 0x5a, 0x09, 0xbc, 0x9c, 0x90, 0xb5, 0x51, 0x87, 0x39, 0xe9, 0xb1,
];
/// Argon2i: KiB of memory, passes, lanes.
const COST: (u32, u32, u32) = (524_288, 8, 1);
/// Words of a new phrase, and bytes of as many of the longest words.
const WORDS: usize = 12;
const PHRASE_BYTES_MAX: usize = WORDS * 9;
/// Bytes of a new key file.
const JSON_BYTES_MAX: usize = 1024;

/// What is wrong with a key file, or with the password of one; never a part of a secret.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum KeyFileError {
    /// A format that older tools wrote.
    #[error("is encrypted with {0}, which is not read: update it with btcli")]
    OldFormat(&'static str),
    /// There is nothing to decrypt.
    #[error("is not encrypted")]
    Plain,
    /// It ends too early.
    #[error("is cut short")]
    Short,
    /// The password opens nothing.
    #[error("does not open: the password is wrong")]
    Password,
    /// A variable that should hold the password.
    #[error("the variable {0} does not hold a password as btcli stores it")]
    Variable(String),
    /// No password could be asked for, and why.
    #[error("{0}")]
    NotAsked(String),
    /// It is not JSON, or not of such a file.
    #[error("is not a key file: JSON, line {line}")]
    Json {
        /// Counted from 1.
        line: usize,
    },
    /// A key of another kind.
    #[error("must hold an sr25519 key (cryptoType 1), got cryptoType {0}")]
    CryptoType(String),
    /// Its address cannot be parsed.
    #[error("`ss58Address`: {0}")]
    Address(AddressError),
    /// Its public key does not have 32 bytes.
    #[error("`publicKey` must be 32 bytes")]
    PublicKey,
    /// It says nothing of whose it is.
    #[error("names neither `ss58Address` nor `publicKey`")]
    NoKey,
    /// It has no secret that can be read.
    #[error("holds no secret that can be read")]
    NoSecret,
    /// Its secrets and its address disagree.
    #[error("holds secrets of another key than its address {0}")]
    OtherKey(Hotkey),
    /// The words are not a phrase.
    #[error("not a BIP-39 phrase")]
    Phrase,
    /// Its seed cannot be parsed.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// A key cannot be derived, made or written down, and why.
    #[error("{0}")]
    Making(String),
}

impl KeyFileError {
    fn making(why: impl std::fmt::Display) -> Self {
        Self::Making(why.to_string())
    }
}

/// Whether the bytes of a key file need a password.
///
/// # Errors
/// Names the format, where it is one that is not read.
pub fn is_encrypted(bytes: &[u8]) -> Result<bool, KeyFileError> {
    if let Some((_, name)) = OLD.iter().find(|(prefix, _)| bytes.starts_with(prefix)) {
        return Err(KeyFileError::OldFormat(name));
    }
    Ok(bytes.starts_with(NACL))
}

/// Decrypts a key file.
///
/// # Errors
/// When it is cut short or the password is wrong.
pub fn decrypt(bytes: &[u8], password: &SecretString) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let sealed = bytes.strip_prefix(NACL).ok_or(KeyFileError::Plain)?;
    if sealed.len() < NONCE_BYTES {
        return Err(KeyFileError::Short);
    }
    open(sealed, &*derive(password)?)
}

/// Derives the key that the file is sealed with, by argon2i at [`COST`].
fn derive(password: &SecretString) -> Result<Zeroizing<[u8; 32]>, KeyFileError> {
    let mut key = Zeroizing::new([0; 32]);
    let (memory, passes, lanes) = COST;
    let params =
        Params::new(memory, passes, lanes, Some(key.len())).map_err(KeyFileError::making)?;
    let mut blocks = Zeroizing::new(vec![Block::default(); params.block_count()]);
    let password = password.expose_secret().as_bytes();
    Argon2::new(Algorithm::Argon2i, Version::V0x13, params)
        .hash_password_into_with_memory(password, &SALT, key.as_mut_slice(), &mut *blocks)
        .map_err(KeyFileError::making)?;
    Ok(key)
}

fn open(sealed: &[u8], key: &[u8; 32]) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let (nonce, sealed) = sealed.split_at(NONCE_BYTES);
    let cipher = XSalsa20Poly1305::new(key.as_slice().into());
    let open = cipher.decrypt(Nonce::from_slice(nonce), sealed);
    open.map(Zeroizing::new).map_err(|_| KeyFileError::Password)
}

/// The variable that may hold the password of the key file at `path`.
pub fn password_variable(path: &Path) -> String {
    format!("BT_PW_{}", path.display().to_string().replace(['/', '.'], "_").to_uppercase())
}

/// The password in such a variable: base64 over the password XOR the variable's name.
///
/// # Errors
/// When it is not that.
pub fn password_of(variable: &str, value: &str) -> Result<SecretString, KeyFileError> {
    let wrong = || KeyFileError::Variable(variable.to_owned());
    let mixed = Zeroizing::new(STANDARD.decode(value.trim()).map_err(|_| wrong())?);
    let mask = variable.bytes().cycle();
    let mut plain = Zeroizing::new(Vec::with_capacity(mixed.len()));
    plain.extend(mixed.iter().zip(mask).map(|(byte, key)| byte ^ key));
    std::str::from_utf8(&plain).map(SecretString::from).map_err(|_| wrong())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeyFile {
    #[serde(rename = "ss58Address")]
    address: Option<String>,
    public_key: Option<String>,
    #[serde(default)]
    crypto_type: Value,
    secret_phrase: Option<SecretString>,
    secret_seed: Option<SecretString>,
    private_key: Option<SecretString>,
}

impl KeyFile {
    fn read(json: &[u8]) -> Result<Self, KeyFileError> {
        // What serde says could repeat a secret.
        let file: Self =
            serde_json::from_slice(json).map_err(|e| KeyFileError::Json { line: e.line() })?;
        match &file.crypto_type {
            Value::Null => Ok(file),
            kind if kind == 1 || kind == "1" => Ok(file),
            kind => Err(KeyFileError::CryptoType(kind.to_string())),
        }
    }

    fn hotkey(&self) -> Result<Hotkey, KeyFileError> {
        match (&self.address, &self.public_key) {
            (Some(address), _) => address.parse().map_err(KeyFileError::Address),
            (None, Some(key)) => Ok(Hotkey(*bytes(key).ok_or(KeyFileError::PublicKey)?)),
            (None, None) => Err(KeyFileError::NoKey),
        }
    }

    /// What the secret fields give, the most reliable first.
    fn candidates(&self) -> impl Iterator<Item = Keypair> {
        let phrase = self.secret_phrase.as_ref().and_then(|p| from_phrase(p).ok());
        let seed = self.secret_seed.as_ref().and_then(|s| bytes(s.expose_secret()));
        let secret = self.private_key.as_ref().and_then(|s| bytes(s.expose_secret()));
        let seed = seed.and_then(|s: Zeroizing<[u8; 32]>| Keypair::from_seed(&s).ok());
        let secret = secret.and_then(|s: Zeroizing<[u8; 64]>| Keypair::from_secret(&s).ok());
        [phrase, seed, secret].into_iter().flatten()
    }
}

fn bytes<const N: usize>(text: &str) -> Option<Zeroizing<[u8; N]>> {
    let mut bytes = Zeroizing::new([0; N]);
    let digits = text.strip_prefix("0x").unwrap_or(text);
    hex::decode_to_slice(digits, bytes.as_mut_slice()).ok()?;
    Some(bytes)
}

/// `0x` and digits.
fn to_hex(secret: &[u8]) -> Result<Zeroizing<String>, KeyFileError> {
    let mut digits = Zeroizing::new(vec![0; 2 * secret.len()]);
    hex::encode_to_slice(secret, &mut digits).map_err(KeyFileError::making)?;
    let mut text = Zeroizing::new(String::with_capacity(2 + digits.len()));
    text.push_str("0x");
    text.push_str(std::str::from_utf8(&digits).map_err(KeyFileError::making)?);
    Ok(text)
}

/// The public key in a file with or without secrets.
///
/// # Errors
/// What is wrong with it.
pub fn public_key(json: &[u8]) -> Result<Hotkey, KeyFileError> {
    KeyFile::read(json)?.hotkey()
}

/// The key pair in a file with secrets.
///
/// # Errors
/// What is wrong with it; never a part of a secret.
pub fn keypair(json: &[u8]) -> Result<Keypair, KeyFileError> {
    let file = KeyFile::read(json)?;
    let hotkey = file.hotkey()?;
    let mut candidates = file.candidates().peekable();
    if candidates.peek().is_none() {
        return Err(KeyFileError::NoSecret);
    }
    let found = candidates.find(|pair| pair.hotkey() == hotkey);
    found.ok_or(KeyFileError::OtherKey(hotkey))
}

/// The key pair of a BIP-39 phrase, as Substrate derives it: PBKDF2 over the entropy, not over the
/// words.
///
/// # Errors
/// When it is not such a phrase.
pub fn from_phrase(phrase: &SecretString) -> Result<Keypair, KeyFileError> {
    let words = bip39::Mnemonic::parse_in(bip39::Language::English, phrase.expose_secret());
    let seed = phrase_seed(&words.map_err(|_| KeyFileError::Phrase)?);
    Ok(Keypair::from_seed(&seed)?)
}

fn phrase_seed(words: &bip39::Mnemonic) -> Zeroizing<[u8; 32]> {
    let entropy = Zeroizing::new(words.to_entropy());
    let mut long = Zeroizing::new([0; 64]);
    pbkdf2::pbkdf2_hmac::<sha2::Sha512>(&entropy, b"mnemonic", 2048, long.as_mut_slice());
    let mut seed = Zeroizing::new([0; 32]);
    seed.copy_from_slice(&long[..32]);
    seed
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    account_id: String,
    public_key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    private_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_phrase: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_seed: Option<&'a str>,
    #[serde(rename = "ss58Address")]
    address: String,
}

/// A key that is about to be written.
pub struct NewKey {
    /// Signs, and knows its own address.
    pub pair: Keypair,
    /// The file with its secrets.
    pub json: Zeroizing<Vec<u8>>,
    /// The public file.
    pub public_json: Vec<u8>,
}

/// A new key with a phrase of twelve words.
///
/// # Errors
/// When the system gives no randomness.
pub fn generate() -> Result<NewKey, KeyFileError> {
    let words = bip39::Mnemonic::generate_in(bip39::Language::English, WORDS);
    let words = words.map_err(KeyFileError::making)?;
    let mut phrase = Zeroizing::new(String::with_capacity(PHRASE_BYTES_MAX));
    write!(*phrase, "{words}").map_err(KeyFileError::making)?;
    let seed = phrase_seed(&words);
    let pair = Keypair::from_seed(&seed)?;
    let hotkey = pair.hotkey();
    let key = format!("0x{}", hex::encode(hotkey.0));
    let public = Written {
        account_id: key.clone(),
        public_key: key,
        private_key: None,
        secret_phrase: None,
        secret_seed: None,
        address: hotkey.to_string(),
    };
    let public_json = serde_json::to_vec(&public).map_err(KeyFileError::making)?;
    let (secret, seed) = (to_hex(pair.to_secret().as_slice())?, to_hex(seed.as_slice())?);
    // Without `cryptoType`: one release of the official tools cannot read it.
    let whole = Written {
        private_key: Some(&secret),
        secret_phrase: Some(&phrase),
        secret_seed: Some(&seed),
        ..public
    };
    let mut json = Zeroizing::new(Vec::with_capacity(JSON_BYTES_MAX));
    serde_json::to_writer(&mut *json, &whole).map_err(KeyFileError::making)?;
    Ok(NewKey { pair, json, public_json })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::tests::vectors;
    use serde_json::json;

    #[test]
    fn files_of_the_official_tools_give_their_keys() {
        for vector in vectors("wallet_vectors.json")["vectors"].as_array().unwrap() {
            let hotkey: Hotkey = vector["ss58"].as_str().unwrap().parse().unwrap();
            let message = hex::decode(&vector["message_hex"].as_str().unwrap()[2..]).unwrap();
            let signature = bytes(vector["signature"].as_str().unwrap()).unwrap();
            assert!(hotkey.verify(&message, &signature));
            let file = &vector["hotkey_file"];
            if file.is_null() {
                continue;
            }
            let pair = keypair(file.to_string().as_bytes()).unwrap();
            assert_eq!(pair.hotkey(), hotkey);
            // Any one secret is enough, and a corrupt one beside a good one does no harm.
            for kept in ["secretPhrase", "secretSeed", "privateKey"] {
                let mut part = file.clone();
                for other in ["secretPhrase", "secretSeed", "privateKey"] {
                    if other != kept {
                        part[other] = json!("0x\u{11}\u{11}");
                    }
                }
                if file[kept].is_string() {
                    let pair = keypair(part.to_string().as_bytes()).unwrap();
                    assert_eq!(pair.hotkey(), hotkey, "{kept}");
                }
            }
            assert_eq!(public_key(file.to_string().as_bytes()), Ok(hotkey));
        }
    }

    #[test]
    fn an_encrypted_file_opens_with_its_password_only() {
        // Deriving a key takes seconds by design, so it is done once.
        let vector = &vectors("wallet_vectors.json")["encrypted_coldkey"];
        let file = hex::decode(vector["file_hex"].as_str().unwrap()).unwrap();
        assert_eq!(is_encrypted(&file), Ok(true));
        let password = SecretString::from(vector["password"].as_str().unwrap());
        let json = decrypt(&file, &password).unwrap();
        let hotkey = keypair(&json).unwrap().hotkey();
        assert_eq!(Ok(hotkey), public_key(&json));
        let wrong = open(&file[NACL.len()..], &[7; 32]).unwrap_err().to_string();
        assert!(wrong.contains("password is wrong"), "{wrong}");
        assert!(decrypt(b"$NACLxx", &password).unwrap_err().to_string().contains("cut short"));
    }

    #[test]
    fn faults_are_named_and_secrets_are_not() {
        let of = |value: Value| keypair(value.to_string().as_bytes()).unwrap_err().to_string();
        let seed = format!("0x{}", "07".repeat(32));
        let other = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";
        for (file, want) in [
            (json!({"ss58Address": other, "secretSeed": seed}), "secrets of another key"),
            (json!({"ss58Address": other, "secretSeed": seed, "cryptoType": 0}), "cryptoType 0"),
            (json!({"ss58Address": other}), "no secret"),
            (json!({"secretSeed": seed}), "neither `ss58Address`"),
            (json!({"ss58Address": "5Grw", "secretSeed": seed}), "not an SS58 address"),
            (json!({"secretSeed": 7}), "not a key file"),
            (json!("0707"), "not a key file"),
        ] {
            let error = of(file);
            assert!(error.contains(want) && !error.contains("0707"), "{error}");
        }
        let old = |bytes: &[u8]| is_encrypted(bytes).unwrap_err().to_string();
        assert!(old(b"$ANSIBLE_VAULT;1.1").contains("Ansible"));
        assert!(old(b"gAAAAABk").contains("Fernet"));
    }

    #[test]
    fn the_password_variable_is_btclis() {
        let path = Path::new("/home/me/.bittensor/wallets/w/coldkey");
        let name = password_variable(path);
        assert_eq!(name, "BT_PW__HOME_ME__BITTENSOR_WALLETS_W_COLDKEY");
        let mixed: Vec<u8> = b"s3cret".iter().zip(name.bytes()).map(|(a, b)| a ^ b).collect();
        let password = password_of(&name, &STANDARD.encode(mixed)).unwrap();
        assert_eq!(password.expose_secret(), "s3cret");
        assert!(password_of(&name, "%%").unwrap_err().to_string().contains(&name));
    }

    #[test]
    fn new_keys_can_be_read_back() {
        let NewKey { pair, json, public_json: public } = generate().unwrap();
        assert_eq!(keypair(&json).unwrap().hotkey(), pair.hotkey());
        assert_eq!(public_key(&public), Ok(pair.hotkey()));
        assert!(!String::from_utf8(public).unwrap().contains("secret"));
    }
}
