//! Puts together the tensors that one quantised matrix is made of.

use crate::models::coded::{Coded, Coding, Groups, Layout, ScaleType, Stored, Zeros};
use crate::models::error::LoadError;
use crate::models::tensor::{StoredType, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the elements of a stored type are codes of.
pub(super) fn coding(stored: &StoredType) -> Option<Coding> {
    match stored {
        StoredType::Unread(name) if name == "F8_E4M3" => Some(Coding::Float8),
        StoredType::Unread(name) if name == "I8" => Some(Coding::Int8),
        _ => None,
    }
}

/// Codes of so many bits in words, with scales for groups of so many inputs, or for all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Words {
    pub(super) bits: u32,
    pub(super) group: Option<usize>,
}

impl Words {
    /// Codes of a word.
    fn many(self) -> usize {
        (u32::BITS / self.bits) as usize
    }
}

/// The tensors that one matrix is made of.
pub(super) struct Parts<'a> {
    pub(super) module: &'a str,
    pub(super) stored: &'a BTreeMap<String, Tensor>,
    pub(super) codes: &'a Tensor,
}

impl<'a> Parts<'a> {
    fn find(&self, end: &str) -> Option<&'a Tensor> {
        self.stored.get(&format!("{}.{end}", self.module))
    }

    fn get(&self, end: &str) -> Result<&'a Tensor, LoadError> {
        self.find(end)
            .ok_or_else(|| self.codes.error(format!("has no `{}.{end}` beside it", self.module)))
    }

    fn scale_type(scales: &Tensor) -> Result<ScaleType, LoadError> {
        let name = scales.stored.name();
        ScaleType::of(&name)
            .ok_or_else(|| scales.error(format!("must be F16, BF16 or F32, got {name}")))
    }

    /// Whole numbers of 32 bits in this shape.
    fn words(tensor: &Tensor, shape: &[usize]) -> Result<Stored, LoadError> {
        let name = tensor.stored.name();
        if name != "I32" {
            return Err(tensor.error(format!("must be I32, got {name}")));
        }
        Ok(bytes(&tensor.clone().expect(shape)?))
    }

    /// Group of each input, where inputs of a group are no neighbours.
    fn of_inputs(
        tensor: Option<&Tensor>,
        cols: usize,
        (size, count): (usize, usize),
    ) -> Result<Option<Vec<u32>>, LoadError> {
        let Some(tensor) = tensor else { return Ok(None) };
        let words = Self::words(tensor, &[cols])?.read()?;
        let words = words.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        if words.clone().all(|group| group == -1) {
            return Ok(None); // compressed-tensors' word for no order
        }
        let groups: Result<Vec<u32>, i32> = words
            .map(|g| u32::try_from(g).ok().filter(|g| (*g as usize) < count).ok_or(g))
            .collect();
        let groups = groups.map_err(|group| {
            tensor.error(format!("must name groups below {count}, got {group}"))
        })?;
        let is_plain = groups.iter().enumerate().all(|(col, group)| col / size == *group as usize);
        Ok((!is_plain).then_some(groups))
    }

    /// Inputs of a group: as the configuration says, or all.
    fn group_size(
        scales: &Tensor,
        (inputs, count): (usize, usize),
        said: Option<usize>,
    ) -> Result<usize, LoadError> {
        let size = said.unwrap_or(inputs);
        match size > 0 && inputs > 0 && inputs.div_ceil(size) == count {
            true => Ok(size),
            false => {
                let what = format!("has {count} groups, {inputs} inputs in groups of {size} have");
                Err(scales.error(format!("{what} {}", inputs.div_ceil(size.max(1)))))
            }
        }
    }

    /// The shape of words that hold `many` codes each.
    fn dimensions(&self, many: usize) -> Result<[usize; 2], LoadError> {
        match *self.codes.shape.as_slice() {
            // No more codes than the file has bits.
            [first, second] if first.max(second).checked_mul(many).is_some() => Ok([first, second]),
            _ => {
                let what = format!("must have two dimensions, got {:?}", self.codes.shape);
                Err(self.codes.error(what))
            }
        }
    }

    /// Words of neighbouring inputs.
    pub(super) fn gptq(
        &self,
        words: Words,
        zero_more: u32,
        is_ordered: bool,
    ) -> Result<Coded, LoadError> {
        let many = words.many();
        let [high, rows] = self.dimensions(many)?;
        if !rows.is_multiple_of(many) {
            let what = format!("{rows} outputs must be a multiple of {many}");
            return Err(self.codes.error(what));
        }
        let coded = self.by_input((Layout::Columns, words), [rows, high * many], zero_more)?;
        let order = match is_ordered {
            true => Some(self.get("g_idx")?),
            false => self.find("g_idx"),
        };
        let Groups { block: [_, size], count: [_, count], .. } = coded.groups;
        let of_inputs = Self::of_inputs(order, high * many, (size, count))?;
        Ok(Coded { groups: Groups { of_inputs, ..coded.groups }, ..coded })
    }

    /// Words of neighbouring outputs.
    pub(super) fn awq(&self, words: Words) -> Result<Coded, LoadError> {
        let many = words.many();
        let [cols, wide] = self.dimensions(many)?;
        self.by_input((Layout::Interleaved, words), [wide * many, cols], 0)
    }

    /// A matrix whose scales and zeros lie by groups of inputs.
    fn by_input(
        &self,
        (layout, words): (Layout, Words),
        [rows, cols]: [usize; 2],
        zero_more: u32,
    ) -> Result<Coded, LoadError> {
        let Words { bits, group } = words;
        let scales = self.get("scales")?;
        let count = scales.shape.first().copied().unwrap_or(0);
        let scales = scales.clone().expect(&[count, rows])?;
        let size = Self::group_size(&scales, (cols, count), group)?;
        let zeros = Self::words(self.get("qzeros")?, &[count, rows / words.many()])?;
        let (block, count) = ([1, size], [rows, count]);
        Ok(Coded {
            shape: [rows, cols],
            coding: Coding::Packed(layout, bits),
            codes: Self::words(self.codes, &self.codes.shape)?,
            scale_type: Self::scale_type(&scales)?,
            scales: bytes(&scales),
            zeros: Zeros::Stored(zeros, zero_more),
            groups: Groups { block, count, by_input: true, of_inputs: None },
        })
    }

    /// Words of compressed-tensors.
    pub(super) fn packed(&self, words: Words) -> Result<Coded, LoadError> {
        let Words { bits, group } = words;
        let many = words.many();
        let [rows, cols] = self.shape()?;
        let scales = self.get("weight_scale")?;
        let (count, shape) = match scales.shape.len() {
            0 | 1 => (1, vec![rows]),
            _ => (scales.cols(), vec![rows, scales.cols()]),
        };
        let size = Self::group_size(scales, (cols, count), group)?;
        let scales = scales.clone().expect(&shape)?;
        let zeros = match self.find("weight_zero_point") {
            None => Zeros::Middle,
            Some(zeros) => Zeros::Stored(Self::words(zeros, &[rows.div_ceil(many), count])?, 0),
        };
        let of_inputs = Self::of_inputs(self.find("weight_g_idx"), cols, (size, count))?;
        Ok(Coded {
            shape: [rows, cols],
            coding: Coding::Packed(Layout::Rows, bits),
            codes: Self::words(self.codes, &[rows, cols.div_ceil(many)])?,
            scale_type: Self::scale_type(&scales)?,
            scales: bytes(&scales),
            zeros,
            groups: Groups { block: [1, size], count: [rows, count], by_input: false, of_inputs },
        })
    }

    /// The shape that compressed-tensors store beside packed codes.
    fn shape(&self) -> Result<[usize; 2], LoadError> {
        let tensor = self.get("weight_shape")?;
        let (name, all) = (tensor.stored.name(), bytes(&tensor.clone().expect(&[2])?).read()?);
        let number = |bytes: &[u8]| match (name.as_str(), bytes.len()) {
            ("I64", 8) => i64::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
            ("I32", 4) => i32::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
            _ => None,
        };
        let sizes: Option<Vec<usize>> = all.chunks(all.len().max(2) / 2).map(number).collect();
        match sizes.as_deref() {
            Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => Err(tensor.error("must hold the two sizes of a matrix as I64 or I32")),
        }
    }

    /// Codes of eight bits in rows.
    pub(super) fn in_rows(&self, block: Option<[usize; 2]>) -> Result<Coded, LoadError> {
        let codes = self.codes;
        let [rows, cols] = [codes.rows(), codes.cols()];
        let scales = match self.find("weight_scale") {
            Some(scales) => scales,
            None => self.get("weight_scale_inv")?,
        };
        for end in ["weight_zero_point", "weight_g_idx"] {
            if let Some(part) = self.find(end) {
                return Err(part.error("is not supported beside codes of eight bits"));
            }
        }
        let block = match (scales.shape.as_slice(), block) {
            ([] | [1] | [1, 1], _) => Some([rows, cols]),
            (&[_] | &[_, 1], None) => Some([1, cols]),
            (&[_, _], Some(block)) => Some(block),
            _ => None,
        };
        let block = block.filter(|block| !block.contains(&0));
        let count = block.map(|[out, along]| [rows.div_ceil(out), cols.div_ceil(along)]);
        let groups: usize = scales.shape.iter().product();
        let fits = |[out, along]: &[usize; 2]| groups == out * along;
        let (block, count) = block.zip(count.filter(fits)).ok_or_else(|| {
            scales.error(format!("has shape {:?} for {rows} x {cols} codes", scales.shape))
        })?;
        Ok(Coded {
            shape: [rows, cols],
            coding: coding(&codes.stored).ok_or_else(|| codes.error("holds no codes"))?,
            codes: bytes(codes),
            scale_type: Self::scale_type(scales)?,
            scales: bytes(scales),
            zeros: Zeros::Middle,
            groups: Groups { block, count, by_input: false, of_inputs: None },
        })
    }
}

fn bytes(tensor: &Tensor) -> Stored {
    let Tensor { name, file, range, .. } = tensor;
    Stored { name: name.clone(), file: Arc::clone(file), range: range.clone() }
}
