//! Instructions for the kernel's own machine (RFC 9669), one method each, with jumps that go forward to a label.

use std::io;
use std::os::fd::AsFd;

use super::number;

/// A register: `R0` takes results, `R1` to `R5` are what a call is given, and lost by it; the others stay. `FP` is the end of a stack of 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    Fp,
}

/// How many bytes are read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// One.
    Byte,
    /// Two.
    Half,
    /// Four.
    Word,
    /// Eight.
    Double,
}

/// What the kernel can be asked for (`enum bpf_func_id`, linux/bpf.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Helper {
    /// `(map, key) -> value or null`
    MapLookup = 1,
    /// `(map, key, value, flags) -> 0 or an error`
    MapUpdate = 2,
    /// `(packet, offset, to, length) -> 0 or an error`
    LoadBytes = 26,
    /// `(packet) -> number of its socket, which is never used again`
    SocketCookie = 46,
    /// `(packet, level) -> id of the cgroup that its socket's has at this level, or 0`
    AncestorCgroup = 83,
    /// `(socket) -> the same, if there is all of it, or null`
    FullSocket = 95,
}

/// A place that is jumped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// A program.
#[derive(Debug, Clone, Default)]
pub struct Code {
    instructions: Vec<Instruction>,
    /// Where each label is.
    labels: Vec<Option<usize>>,
    /// Which instruction jumps where.
    jumps: Vec<(usize, Label)>,
}

#[derive(Debug, Clone, Copy)]
struct Instruction {
    code: u8,
    destination: Register,
    /// A register, or a number that says what the immediate is.
    source: u8,
    offset: i16,
    immediate: i32,
}

impl Code {
    /// `to = value`
    pub fn set(&mut self, to: Register, value: i32) {
        self.push(0xb7, to, 0, 0, value);
    }

    /// `to = from`
    pub fn copy(&mut self, to: Register, from: Register) {
        self.push(0xbf, to, from as u8, 0, 0);
    }

    /// `to += value`
    pub fn add(&mut self, to: Register, value: i32) {
        self.push(0x07, to, 0, 0, value);
    }

    /// `to += other`
    pub fn add_register(&mut self, to: Register, other: Register) {
        self.push(0x0f, to, other as u8, 0, 0);
    }

    /// `to &= value`
    pub fn and(&mut self, to: Register, value: i32) {
        self.push(0x57, to, 0, 0, value);
    }

    /// `to <<= bits`
    pub fn shift_left(&mut self, to: Register, bits: i32) {
        self.push(0x67, to, 0, 0, bits);
    }

    /// `to >>= bits`
    pub fn shift_right(&mut self, to: Register, bits: i32) {
        self.push(0x77, to, 0, 0, bits);
    }

    /// `to = *(from + offset)`
    pub fn load(&mut self, size: Size, to: Register, from: Register, offset: i16) {
        self.push(0x61 | size.bits(), to, from as u8, offset, 0);
    }

    /// `*(to + offset) = from`
    pub fn store(&mut self, size: Size, to: Register, offset: i16, from: Register) {
        self.push(0x63 | size.bits(), to, from as u8, offset, 0);
    }

    /// `to = map`
    ///
    /// # Errors
    /// If the map's descriptor has no number.
    pub fn set_map(&mut self, to: Register, map: impl AsFd) -> io::Result<()> {
        // BPF_PSEUDO_MAP_FD, in an instruction of twice the length.
        self.push(0x18, to, 1, 0, number(map.as_fd())?.cast_signed());
        self.push(0, Register::R0, 0, 0, 0);
        Ok(())
    }

    /// `R0 = helper(R1, ..)`
    pub fn call(&mut self, helper: Helper) {
        self.push(0x85, Register::R0, 0, 0, helper as i32);
    }

    /// Ends with R0.
    pub fn exit(&mut self) {
        self.push(0x95, Register::R0, 0, 0, 0);
    }

    /// A label, whose place is said later.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Here is the label.
    pub fn here(&mut self, label: Label) {
        let at = self.instructions.len();
        if let Some(place) = self.labels.get_mut(label.0) {
            *place = Some(at);
        }
    }

    /// `goto label`
    pub fn jump(&mut self, label: Label) {
        self.jump_by(0x05, Register::R0, 0, 0, label);
    }

    /// `if register == value goto label`
    pub fn jump_if(&mut self, register: Register, value: i32, label: Label) {
        self.jump_by(0x15, register, 0, value, label);
    }

    /// `if register != value goto label`
    pub fn jump_unless(&mut self, register: Register, value: i32, label: Label) {
        self.jump_by(0x55, register, 0, value, label);
    }

    /// `if one == other goto label`
    pub fn jump_if_same(&mut self, one: Register, other: Register, label: Label) {
        self.jump_by(0x1d, one, other as u8, 0, label);
    }

    fn jump_by(&mut self, code: u8, destination: Register, source: u8, immediate: i32, label: Label) {
        self.jumps.push((self.instructions.len(), label));
        self.push(code, destination, source, 0, immediate);
    }

    fn push(&mut self, code: u8, destination: Register, source: u8, offset: i16, immediate: i32) {
        self.instructions.push(Instruction {
            code,
            destination,
            source,
            offset,
            immediate,
        });
    }

    /// As the kernel reads them.
    ///
    /// # Errors
    /// If something jumps to a label that is nowhere, or too far away.
    pub fn instructions(&self) -> io::Result<Vec<[u8; 8]>> {
        let mut instructions = self.instructions.clone();
        for (at, label) in &self.jumps {
            let to = self.labels.get(label.0).copied().flatten();
            let distance = to.and_then(|to| i16::try_from(to.checked_sub(at + 1)?).ok());
            match (instructions.get_mut(*at), distance) {
                (Some(instruction), Some(distance)) => instruction.offset = distance,
                _ => return Err(io::Error::other("a jump that leads nowhere")),
            }
        }
        Ok(instructions.into_iter().map(Instruction::bytes).collect())
    }
}

impl Instruction {
    fn bytes(self) -> [u8; 8] {
        let [o0, o1] = self.offset.to_ne_bytes();
        let [i0, i1, i2, i3] = self.immediate.to_ne_bytes();
        let destination = self.destination as u8;
        // Destination in the lower half on little-endian machines, in the upper on others.
        let registers = if cfg!(target_endian = "little") {
            self.source << 4 | destination
        } else {
            destination << 4 | self.source
        };
        [self.code, registers, o0, o1, i0, i1, i2, i3]
    }
}

impl Size {
    const fn bits(self) -> u8 {
        match self {
            Self::Word => 0x00,
            Self::Half => 0x08,
            Self::Byte => 0x10,
            Self::Double => 0x18,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Register::{R0, R1, R2, R6};
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_written_as_the_kernel_reads_them() -> io::Result<()> {
        let mut code = Code::default();
        let end = code.label();
        code.load(Size::Word, R2, R1, 40);
        code.jump_if(R2, 1, end);
        code.store(Size::Double, Register::Fp, -8, R6);
        code.call(Helper::FullSocket);
        code.here(end);
        code.set(R0, -1);
        code.exit();
        assert_eq!(
            code.instructions()?,
            [
                [0x61, 0x12, 40, 0, 0, 0, 0, 0],
                [0x15, 0x02, 2, 0, 1, 0, 0, 0],
                [0x7b, 0x6a, 0xf8, 0xff, 0, 0, 0, 0],
                [0x85, 0, 0, 0, 95, 0, 0, 0],
                [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
                [0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
        );
        Ok(())
    }

    #[test]
    fn a_jump_that_leads_nowhere_or_back_is_refused() {
        let mut code = Code::default();
        let nowhere = code.label();
        code.jump(nowhere);
        assert!(code.instructions().is_err());
        let mut code = Code::default();
        let back = code.label();
        code.here(back);
        code.jump(back);
        assert!(code.instructions().is_err());
    }
}
