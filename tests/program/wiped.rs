//! Secrets do not stay behind in memory: all that is freed while keys are read, opened and made is
//! kept and searched for them.

use parking_lot::Mutex;
use secrecy::SecretString;
use serde_json::Value;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use targon_engine::chain::keyfile::{self, KeyFileError};
use targon_engine::chain::keys::Keypair;
use targon_engine::chain::wallet::Wallet;

/// Blocks above this are the memory of the password's hash.
const BLOCK_BYTES_MAX: usize = 1 << 20;
const FREED_BYTES_MAX: usize = 16 << 20;

static FREED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, which keeps what this thread frees while it is told to.
pub(crate) struct Recorder;

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Recorder {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as for the caller. Zeroed, so that all of a block can be read when it is freed.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if IS_ON.try_with(Cell::get).unwrap_or(false) && layout.size() <= BLOCK_BYTES_MAX {
            // SAFETY: the block is allocated, of this size, and was zeroed at first.
            let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
            let mut freed = FREED.lock();
            assert!(freed.capacity() - freed.len() >= bytes.len(), "too much is freed");
            freed.extend_from_slice(bytes);
        }
        // SAFETY: as for the caller.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What `work` gives, and all that it frees.
fn record<T>(work: impl FnOnce() -> T) -> (T, Vec<u8>) {
    let mut freed = FREED.lock();
    freed.clear();
    freed.reserve(FREED_BYTES_MAX);
    drop(freed);
    IS_ON.set(true);
    let result = work();
    IS_ON.set(false);
    (result, std::mem::take(&mut *FREED.lock()))
}

/// The secrets of a key file, as texts and as bytes.
fn secrets(file: &Value) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for field in ["secretPhrase", "secretSeed", "privateKey"] {
        let Some(text) = file[field].as_str() else { continue };
        let digits = text.trim_start_matches("0x");
        all.push(digits.as_bytes().to_vec());
        all.extend(hex::decode(digits).ok());
    }
    assert!(!all.is_empty());
    all
}

fn check(freed: &[u8], secrets: &[Vec<u8>]) {
    for secret in secrets {
        // Half of one is too much.
        for part in secret.chunks_exact(secret.len() / 2) {
            let place = freed.windows(part.len()).position(|window| window == part);
            let shown = String::from_utf8_lossy(part);
            assert_eq!(place, None, "{shown:?} stays behind in {} bytes", freed.len());
        }
    }
}

fn vectors() -> Value {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    serde_json::from_slice(&std::fs::read(path.join("wallet_vectors.json")).unwrap()).unwrap()
}

#[test]
fn what_is_not_wiped_is_found() {
    let ((), freed) = record(|| drop(String::from("a secret that stays")));
    assert!(freed.windows(8).any(|window| window == b"a secret"));
}

#[test]
fn reading_a_key_file_leaves_nothing_behind() {
    for vector in vectors()["vectors"].as_array().unwrap() {
        let file = &vector["hotkey_file"];
        if file.is_null() {
            continue;
        }
        let json = file.to_string();
        let (pair, freed) =
            record(|| keyfile::keypair(json.as_bytes()).map(|pair: Keypair| pair.hotkey()));
        assert!(pair.is_ok());
        check(&freed, &secrets(file));
    }
}

#[test]
fn opening_an_encrypted_file_leaves_nothing_behind() {
    let vector = &vectors()["encrypted_coldkey"];
    let sealed = hex::decode(vector["file_hex"].as_str().unwrap()).unwrap();
    let password = vector["password"].as_str().unwrap();
    let open = |password: &SecretString| {
        let json = keyfile::decrypt(&sealed, password).unwrap();
        keyfile::keypair(&json).unwrap().hotkey()
    };
    let variable = "BT_PW__A";
    let mixed: Vec<u8> =
        password.bytes().zip(variable.bytes().cycle()).map(|(a, b)| a ^ b).collect();
    let value = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, mixed);
    let (_, freed) = record(|| open(&keyfile::password_of(variable, &value).unwrap()));
    let json = keyfile::decrypt(&sealed, &SecretString::from(password)).unwrap();
    let mut all = secrets(&serde_json::from_slice(&json).unwrap());
    all.push(password.as_bytes().to_vec());
    check(&freed, &all);
}

#[test]
fn making_a_key_and_reading_it_from_disk_leaves_nothing_behind() {
    let (new, freed) = record(|| keyfile::generate().unwrap());
    let all = secrets(&serde_json::from_slice(&new.json).unwrap());
    check(&freed, &all);
    let root = tempfile::tempdir().unwrap();
    let wallet = Wallet::new(root.path(), "w", "h").unwrap();
    let (made, freed) = record(|| wallet.create_hotkey().unwrap().hotkey());
    let file = std::fs::read(wallet.hotkey_file()).unwrap();
    let all = secrets(&serde_json::from_slice(&file).unwrap());
    check(&freed, &all);
    let never = |_: &std::path::Path| Err(KeyFileError::Plain);
    let (read, freed) = record(|| wallet.keypair(never).unwrap().hotkey());
    assert_eq!(read, made);
    check(&freed, &all);
}
