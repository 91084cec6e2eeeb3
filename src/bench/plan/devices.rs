//! Lists devices by their datasheets: memory, bandwidth, arithmetic and power. Each row names its
//! source, because predictions rest on these figures.

use anyhow::anyhow;

/// What computes on a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceKind {
    /// A graphics card; products run on tensor cores in bf16 with f32 sums.
    Gpu,
    /// A processor; products run as f32 fused multiply-adds on widened bf16.
    Cpu,
}

/// A device as its datasheet describes it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DeviceSpec {
    /// What `--devices` calls it.
    pub name: &'static str,
    /// Whether it is a card or a processor.
    pub kind: DeviceKind,
    /// Bytes of memory; of processors the memory is the machine's and counts as unlimited.
    pub memory: u64,
    /// Memory bandwidth, in bytes a second.
    pub bandwidth: f64,
    /// Floating-point operations a second of the products, without sparsity.
    pub peak: f64,
    /// Share of that peak which `mma.sync`, the instruction of this engine's kernels, can reach:
    /// newer cards have larger instructions. Of processors 1.
    pub mma_share: f64,
    /// Power that the device draws at most, in watts.
    pub power: f64,
    /// Where the numbers come from.
    pub source: &'static str,
}

const GB: u64 = 1_000_000_000;

/// What `mma.sync` is said to reach of an H100's peak; of a B200's it is assumed.
const MMA_SHARE_OF_LARGER: f64 = 0.62;

/// A card: memory in GB, bandwidth in GB/s, dense bf16 in TFLOP/s, watts.
const fn gpu(
    name: &'static str,
    (memory, bandwidth, peak, power): (u64, f64, f64, f64),
    source: &'static str,
) -> DeviceSpec {
    let (memory, bandwidth, peak) = (memory * GB, bandwidth * 1e9, peak * 1e12);
    let (kind, mma_share) = (DeviceKind::Gpu, 1.0);
    DeviceSpec { name, kind, memory, bandwidth, peak, mma_share, power, source }
}

/// A card whose peak belongs to instructions that are larger than `mma.sync`.
const fn large_gpu(
    name: &'static str,
    numbers: (u64, f64, f64, f64),
    source: &'static str,
) -> DeviceSpec {
    DeviceSpec { mma_share: MMA_SHARE_OF_LARGER, ..gpu(name, numbers, source) }
}

/// A processor: cores, GHz with all of them busy on vectors, operations of bf16 products a core and
/// cycle, bandwidth in GB/s, watts.
const fn cpu(
    name: &'static str,
    (cores, ghz, per_cycle, bandwidth, power): (f64, f64, f64, f64, f64),
    source: &'static str,
) -> DeviceSpec {
    let (bandwidth, peak) = (bandwidth * 1e9, cores * ghz * 1e9 * per_cycle);
    let (kind, memory, mma_share) = (DeviceKind::Cpu, u64::MAX, 1.0);
    DeviceSpec { name, kind, memory, bandwidth, peak, mma_share, power, source }
}

/// All that is known.
pub const DEVICES: [DeviceSpec; 11] = [
    gpu("a100-80gb", (80, 2039.0, 312.0, 400.0), "NVIDIA A100 80GB SXM datasheet, 2021"),
    large_gpu("h100-sxm", (80, 3350.0, 989.4, 700.0), "NVIDIA H100 SXM5 datasheet, 2023"),
    large_gpu("h200", (141, 4800.0, 989.4, 700.0), "NVIDIA H200 SXM datasheet, 2024"),
    large_gpu(
        "b200",
        (180, 8000.0, 2250.0, 1000.0),
        "NVIDIA HGX B200 datasheet, 2025, one of 8 GPUs",
    ),
    gpu("l40s", (48, 864.0, 362.05, 350.0), "NVIDIA L40S datasheet, 2023"),
    gpu("rtx-4090", (24, 1008.0, 165.2, 450.0), "NVIDIA Ada whitepaper 2.1, f32 accumulation"),
    gpu(
        "rtx-5090",
        (32, 1792.0, 209.5, 575.0),
        "NVIDIA Blackwell RTX whitepaper, f32 accumulation",
    ),
    cpu(
        "epyc-9654",
        (96.0, 2.4, 64.0, 460.8, 360.0),
        "AMD EPYC 9654 at base clock, 12 channels DDR5-4800, two 256-bit bf16 units",
    ),
    cpu(
        "epyc-9965",
        (192.0, 2.25, 128.0, 576.0, 500.0),
        "AMD EPYC 9965 at base clock, 12 channels DDR5-6000, two 512-bit bf16 units",
    ),
    cpu(
        "xeon-8480",
        (56.0, 2.0, 64.0, 307.2, 350.0),
        "Intel Xeon Platinum 8480+ at base clock, 8 channels DDR5-4800, AVX-512 without AMX",
    ),
    cpu(
        "ryzen-9950x",
        (16.0, 4.3, 128.0, 89.6, 170.0),
        "AMD Ryzen 9 9950X at base clock, 2 channels DDR5-5600, two 512-bit bf16 units",
    ),
];

/// The devices that `names` list; all where it is empty or says `all`.
///
/// # Errors
/// A name that is not in the table, with those that are.
pub fn named(names: &[String]) -> anyhow::Result<Vec<DeviceSpec>> {
    if names.is_empty() || names.iter().any(|n| n == "all") {
        return Ok(DEVICES.to_vec());
    }
    let find = |name: &String| {
        DEVICES.into_iter().find(|d| d.name.eq_ignore_ascii_case(name.trim())).ok_or_else(|| {
            let known: Vec<&str> = DEVICES.iter().map(|d| d.name).collect();
            anyhow!("there is no device \"{name}\" in the table, only {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

/// What drivers call the cards of the table. Others of the same family, such as those for PCIe,
/// have other datasheets.
const BRANDS: [(&str, &str); 7] = [
    ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ("NVIDIA H100 80GB HBM3", "h100-sxm"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200"),
    ("NVIDIA L40S", "l40s"),
    ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ("NVIDIA GeForce RTX 5090", "rtx-5090"),
];

/// The card that its driver calls `brand`, where the table has it.
pub fn of_card(brand: &str) -> Option<DeviceSpec> {
    let (_, name) = BRANDS.into_iter().find(|(known, _)| *known == brand)?;
    DEVICES.into_iter().find(|device| device.name == name)
}

/// The processor that calls itself `brand`, where the table has it.
pub fn of_cpu(brand: &str) -> Option<DeviceSpec> {
    let brand = brand.to_lowercase();
    let is_named = |device: &DeviceSpec| {
        let mut parts = device.name.split('-');
        device.kind == DeviceKind::Cpu
            && parts.all(|part| brand.split([' ', '+', '(']).any(|word| word == part))
    };
    DEVICES.into_iter().find(is_named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_complete_and_names_are_unique() {
        for (index, device) in DEVICES.iter().enumerate() {
            let numbers = [device.bandwidth, device.peak, device.power, device.memory as f64];
            assert!(numbers.iter().all(|n| n.is_finite() && *n > 0.0), "{device:?}");
            // A mistyped unit is off by a thousand: all of these do 10 to 600 operations a byte.
            let ridge = device.peak / device.bandwidth;
            assert!((10.0..600.0).contains(&ridge), "{}: {ridge} FLOP a byte", device.name);
            assert!(DEVICES[..index].iter().all(|d| d.name != device.name));
        }
    }

    #[test]
    fn processors_are_known_by_what_they_call_themselves() {
        let name = |brand: &str| of_cpu(brand).map(|d| d.name);
        assert_eq!(name("AMD EPYC 9654 96-Core Processor"), Some("epyc-9654"));
        assert_eq!(name("Intel(R) Xeon(R) Platinum 8480+"), Some("xeon-8480"));
        assert_eq!(name("AMD Ryzen 9 9950X 16-Core Processor"), Some("ryzen-9950x"));
        assert_eq!((name("AMD EPYC 96540"), name("")), (None, None));
    }

    #[test]
    fn cards_are_known_by_what_drivers_call_them() {
        for (brand, name) in BRANDS {
            assert_eq!(of_card(brand).map(|d| d.name), Some(name));
        }
        let cards = DEVICES.iter().filter(|d| d.kind == DeviceKind::Gpu).count();
        assert_eq!(cards, BRANDS.len());
        for other in ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GB200", ""] {
            assert_eq!(of_card(other), None);
        }
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        assert_eq!(named(&[]).unwrap().len(), DEVICES.len());
        assert_eq!(named(&["h200".into()]).unwrap()[0].memory, 141 * GB);
        assert_eq!(named(&["H200 ".into()]).unwrap()[0].name, "h200");
        let error = named(&["h300".into()]).unwrap_err().to_string();
        assert!(error.contains("no device \"h300\"") && error.contains("h100-sxm"), "{error}");
    }
}
