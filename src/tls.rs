//! Installs the TLS provider of this process: every client that may speak TLS needs it once.

/// Installs it, unless somebody has.
pub fn install() {
    // Fails only where a provider is installed already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
